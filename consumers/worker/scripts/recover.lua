-- Requeue the jobs of one owner whose lease has expired, and forget the owner.
--
-- KEYS 1 lease, 2 reserved list, 3 queue, 4 crash counts, 5 owners
-- ARGV 1 owner, 2 seconds of a lease
-- Reply {keys quarantined, ids of the requeued jobs}.
--
-- A crash counts only against a job that its owner ran alone, and not while the database was stalled: then the owner's
-- entry is 'alone'. Any other job becomes a poison candidate. A lease with more time left than a lease has is from
-- before Redis' clock was set back: its owner renews it, or it ends in time.

local left = redis.call('TTL', KEYS[1])
if left > tonumber(ARGV[2]) or left == -1 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
if left ~= -2 then return {{}, {}} end
local quarantined = quarantine({[KEYS[2]] = 'list', [KEYS[4]] = 'hash'})
local ids = redis.call('LRANGE', KEYS[2], 0, -1)
local counts = #ids == 1 and redis.call('HGET', KEYS[5], ARGV[1]) == 'alone'
for _, id in ipairs(ids) do
    if not counts then
        redis.call('HSETNX', KEYS[4], id, 0)
    elseif type(redis.pcall('HINCRBY', KEYS[4], id, 1)) == 'table' then  -- an error: it is not a number
        redis.call('HSET', KEYS[4], id, 1)
    end
end
redis.call('EXPIRE', KEYS[4], 604800)  -- a stock worker does not remove the counts of the jobs that it completes
while redis.call('LMOVE', KEYS[2], KEYS[3], 'RIGHT', 'LEFT') do end
redis.call('HDEL', KEYS[5], ARGV[1])
return {quarantined, ids}
