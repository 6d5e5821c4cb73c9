-- Reserve jobs from the front of the queue for one owner, under its lease.
--
-- KEYS 1 queue, 2 reserved list, 3 crash counts, 4 lease, 5 owners, 6 timeout counts, 7 quarantined ids
-- ARGV 1 most jobs, 2 bytes after which no further job is added, 3 prefix of job keys, 4 seconds of a lease, 5 owner,
--      6 most bytes of one job
-- Reply {number of ids quarantined, ids, data of each job, notes, crash count or -1, timeout count}. The counts are
--      those of the first job. A note is {index, state, result_ttl}, for each job whose state is not 'usual' or that
--      has a result_ttl.
--
-- If the reply of an earlier call was lost, the reserved list is not empty: its jobs are requeued first. A job with a
-- crash count or a timeout count is reserved alone. The lease and the owner are written at each call, since Redis may
-- have lost its data.

local function count(key, id, found)
    if not found or string.find(found, '^%d%d?%d?%d?$') then return found end
    redis.call('HSET', key, id, 0)  -- the count is not a number
    return '0'
end

-- A job with one of these fields asks RQ for more than to be run: it is unsupported, and is rejected.
local UNSUPPORTED = {'success_callback_name', 'failure_callback_name', 'stopped_callback_name', 'webhooks',
    'repeats_left', 'rate_limit_key'}

local function read(key, most_bytes)
    local size = redis.pcall('HSTRLEN', key, 'data')
    if type(size) == 'table' then
        if string.find(size.err, 'WRONGTYPE', 1, true) then return 'unreadable', '', '' end  -- the key is not a hash
        redis.call('HSTRLEN', key, 'data')  -- raises the error: a forbidden command must not reject the event
    end
    if size > most_bytes then return 'oversized', '', '' end
    local found = redis.call('HMGET', key, 'data', 'result_ttl', unpack(UNSUPPORTED))
    -- A longer number could not be a time to live.
    local ttl = found[2] and #found[2] < 20 and found[2] or ''
    if not found[1] then return redis.call('EXISTS', key) == 1 and 'unreadable' or 'deleted', '', ttl end
    for n, field in ipairs(UNSUPPORTED) do
        if found[n + 2] and found[n + 2] ~= '' then return field, found[1], ttl end
    end
    return 'usual', found[1], ttl
end

local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'none' and kind ~= 'list' then
    return redis.error_reply('WRONGTYPE ' .. KEYS[1] .. ' is a ' .. kind .. ' and not a list: rename or delete it')
end
redis.call('SET', KEYS[4], '1', 'EX', ARGV[4])
redis.call('HSET', KEYS[5], ARGV[5], '')
while redis.call('LMOVE', KEYS[2], KEYS[1], 'RIGHT', 'LEFT') do end

local ids = redis.call('LRANGE', KEYS[1], 0, ARGV[1] - 1)
local unusable = {}
for n = #ids, 1, -1 do
    local id = ids[n]
    if id == '' or #id > 200 or string.find(id, '[^A-Za-z0-9_-]') then  -- RQ could not handle a job of this id
        unusable[#unusable + 1] = table.remove(ids, n)
    end
end
if #unusable > 0 then quarantine({[KEYS[7]] = 'list'}) end
for _, id in ipairs(unusable) do
    redis.call('LREM', KEYS[1], 1, id)
    redis.call('RPUSH', KEYS[7], id)
end
if #ids == 0 then return {#unusable, {}, {}, {}, '-1', '0'} end

local crashes, timeouts = {}, {}
if redis.call('EXISTS', KEYS[3]) == 1 then crashes = redis.call('HMGET', KEYS[3], unpack(ids)) end
if redis.call('EXISTS', KEYS[6]) == 1 then timeouts = redis.call('HMGET', KEYS[6], unpack(ids)) end
local last = (crashes[1] or timeouts[1]) and 1 or #ids
for n = 2, last do
    if crashes[n] or timeouts[n] then last = n - 1 break end
end

local data, notes, bytes = {}, {}, 0
for n = 1, last do
    if bytes >= tonumber(ARGV[2]) then break end
    local state, text, ttl = read(ARGV[3] .. ids[n], tonumber(ARGV[6]))
    data[n] = text
    bytes = bytes + #text
    if state ~= 'usual' or ttl ~= '' then notes[#notes + 1] = {n, state, ttl} end
end
for n = #ids, #data + 1, -1 do ids[n] = nil end
redis.call('RPUSH', KEYS[2], unpack(ids))  -- first: if it is forbidden, no job may be lost
redis.call('LTRIM', KEYS[1], #ids, -1)
return {#unusable, ids, data, notes, count(KEYS[3], ids[1], crashes[1]) or '-1',
    count(KEYS[6], ids[1], timeouts[1]) or '0'}
