-- If the lease of one owner has expired, requeue its jobs at the front of the queue and remove the owner.
--
-- KEYS 1 lease, 2 reserved list, 3 queue, 4 crash counts, 5 owners
-- ARGV 1 owner, 2 seconds of a lease
-- Reply {keys quarantined, ids of the requeued jobs}.
--
-- The owner's entry is 'alone' while it runs one job alone and the database is not stalled. Only then is the crash
-- counted against the job. Any other job becomes a poison candidate. If the lease has more time left than ARGV 2, then
-- Redis' clock was set back: the time is reduced to ARGV 2.

local left = redis.call('TTL', KEYS[1])
if left > tonumber(ARGV[2]) or left == -1 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
if left ~= -2 then return {{}, {}} end
local kind = redis.call('TYPE', KEYS[3]).ok
if kind ~= 'none' and kind ~= 'list' then  -- before anything is counted
    return redis.error_reply('WRONGTYPE ' .. KEYS[3] .. ' is a ' .. kind .. ' and not a list: rename or delete it')
end
local quarantined = quarantine({[KEYS[2]] = 'list', [KEYS[4]] = 'hash'})
local ids = redis.call('LRANGE', KEYS[2], 0, -1)
local counts = #ids == 1 and redis.call('HGET', KEYS[5], ARGV[1]) == 'alone'
for _, id in ipairs(ids) do
    if not counts then
        redis.call('HSETNX', KEYS[4], id, 0)
    else
        local count = redis.pcall('HINCRBY', KEYS[4], id, 1)
        local refused = forbidden(count, 'hincrby')
        if refused then return redis.error_reply(refused) end  -- before anything is changed
        if type(count) == 'table' then redis.call('HSET', KEYS[4], id, 1) end  -- an error: it was not a number
    end
end
redis.call('EXPIRE', KEYS[4], 604800)  -- a stock worker does not remove the counts of the jobs that it completes
while redis.call('LMOVE', KEYS[2], KEYS[3], 'RIGHT', 'LEFT') do end
redis.call('HDEL', KEYS[5], ARGV[1])
return {quarantined, ids}
