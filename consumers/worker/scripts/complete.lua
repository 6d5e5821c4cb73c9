-- Complete deliveries of one owner: acknowledge them to their producers, release them, and finish their jobs or move
-- them to the failed registry.
--
-- KEYS 1 reserved list, 2 crash counts, 3 timeout counts, 4 finished registry, 5 failed registry, 6 worker,
--      7 ... acknowledgements, one hash a source
-- ARGV 2 ... calls for failed jobs, 1 a JSON object:
--      job_prefix, result_prefix   prefixes of RQ's keys
--      released                    ids of all these jobs, in the order of their reservation
--      acknowledgements            for each key from 7 on: job id, text, job id, text ...
--      acknowledged_seconds        after which unclaimed acknowledgements expire
--      forgotten                   ids of finished jobs of which RQ keeps nothing
--      finished                    {id, ttl, result} of finished jobs that are kept for ttl seconds; negative: for ever
--      failed                      {id, ttl, replaced, held, fields, result, call} of jobs for the failed registry;
--                                  with `call`, their call is replaced by that ARGV; without fields only listed
--      job, result                 fields that are the same for every finished job, and for every result
--      now                         seconds since the epoch
--      kept_jobs, held_seconds     most finished jobs that RQ keeps; seconds until a job that others wait for expires
-- Reply {keys quarantined, ids of jobs that others wait for}. These stay reserved: their owner has RQ enqueue the jobs
--      that wait, and releases them then. They are kept for a while, whatever their own wish.
--
-- A job's own keys may hold anything: an error there stops nothing (pcall). Each call costs microseconds: where Redis
-- can be asked about all jobs at once, it is not asked about each.

local batch = cjson.decode(ARGV[1])
local expected = {[KEYS[1]] = 'list', [KEYS[2]] = 'hash', [KEYS[3]] = 'hash', [KEYS[4]] = 'zset', [KEYS[5]] = 'zset',
    [KEYS[6]] = 'hash'}
for n = 7, #KEYS do expected[KEYS[n]] = 'hash' end
local quarantined = quarantine(expected)

local now = redis.call('TIME')[1]  -- relays compare it with Redis' clock
for n, words in ipairs(batch.acknowledgements) do
    for at = 2, #words, 2 do words[at] = now .. ' ' .. words[at] end
    redis.call('HSET', KEYS[6 + n], unpack(words))
    redis.call('EXPIRE', KEYS[6 + n], batch.acknowledged_seconds)
end

local released = batch.released
if table.concat(redis.call('LRANGE', KEYS[1], 0, -1), ' ') == table.concat(released, ' ') then
    redis.call('DEL', KEYS[1])
else
    for _, id in ipairs(released) do redis.call('LREM', KEYS[1], 1, id) end
end
for key = 2, 3 do
    if redis.call('EXISTS', KEYS[key]) == 1 then redis.call('HDEL', KEYS[key], unpack(released)) end
end

-- Others can have come to wait for a job at any time until now, when its status changes.
local dependents, awaited, held = {}, {}, {}
for n, id in ipairs(released) do dependents[n] = batch.job_prefix .. id .. ':dependents' end
if #dependents > 0 and redis.call('EXISTS', unpack(dependents)) > 0 then
    for n, id in ipairs(released) do awaited[id] = redis.call('EXISTS', dependents[n]) == 1 end
end

local function expire(id, seconds)
    redis.call('EXPIRE', batch.job_prefix .. id, seconds)
    redis.call('EXPIRE', batch.job_prefix .. id .. ':dependents', seconds)
    redis.call('EXPIRE', batch.job_prefix .. ':' .. id .. ':dependencies', seconds)
end

local succeeded, forgotten = {}, {}
for _, id in ipairs(batch.forgotten) do
    succeeded[#succeeded + 1] = id
    local job = batch.job_prefix .. id
    if awaited[id] and redis.call('EXISTS', job) == 1 then
        redis.pcall('HSET', job, unpack(batch.job))
        expire(id, batch.held_seconds)
        held[#held + 1] = id
    else
        forgotten[#forgotten + 1] = job
        forgotten[#forgotten + 1] = batch.result_prefix .. id
        forgotten[#forgotten + 1] = batch.job_prefix .. ':' .. id .. ':dependencies'
    end
end
if #forgotten > 0 then redis.call('DEL', unpack(forgotten)) end

for _, one in ipairs(batch.finished) do
    local id, ttl = one.id, one.ttl
    succeeded[#succeeded + 1] = id
    local job, results = batch.job_prefix .. id, batch.result_prefix .. id
    if redis.call('EXISTS', job) == 1 then
        redis.pcall('HSET', job, unpack(batch.job))
        redis.pcall('XADD', results, 'MAXLEN', 10, '*', 'type', '1', 'return_value', one.result, unpack(batch.result))
        if ttl > 0 then
            redis.call('EXPIRE', results, ttl)
            expire(id, ttl)
            if awaited[id] then expire(id, math.max(ttl, batch.held_seconds)) end
        else
            redis.call('PERSIST', results)
            redis.call('PERSIST', job)
        end
        redis.call('ZADD', KEYS[4], ttl > 0 and batch.now + ttl or '+inf', id)
        if awaited[id] then held[#held + 1] = id end
    end
end
if #succeeded > 0 then redis.call('ZREM', KEYS[5], unpack(succeeded)) end

for _, one in ipairs(batch.failed) do
    local id, ttl = one.id, one.ttl
    local job, results = batch.job_prefix .. id, batch.result_prefix .. id
    if #one.fields > 0 then
        if one.replaced or redis.call('TYPE', job).ok ~= 'hash' then redis.call('DEL', job) end
        redis.call('HSET', job, unpack(one.fields))
        if one.call then redis.call('HSET', job, 'data', ARGV[one.call]) end
        redis.call('PERSIST', job)  -- it had an expiry in the queue
        local added = redis.pcall('XADD', results, 'MAXLEN', '~', 10, '*', unpack(one.result))
        if type(added) == 'table' and added.err then
            redis.call('DEL', results)
            redis.call('XADD', results, '*', unpack(one.result))
        end
        if ttl >= 0 then expire(id, ttl) end
        if one.expires_results then
            if ttl >= 0 then redis.call('EXPIRE', results, ttl) else redis.call('PERSIST', results) end
        end
    end
    redis.call('ZADD', KEYS[5], ttl >= 0 and batch.now + ttl or -1, id)
    if one.held or (awaited[id] and #one.fields > 0) then held[#held + 1] = id end
end

-- Jobs that are kept for ever do not count. A thousand at once is more than a batch adds.
local excess = #succeeded > 0 and redis.call('ZCOUNT', KEYS[4], 0, '(+inf') - batch.kept_jobs or 0
if excess > 0 then
    local keep = {}
    for _, id in ipairs(held) do keep[id] = true end
    local oldest = redis.call('ZRANGEBYSCORE', KEYS[4], 0, '(+inf', 'LIMIT', 0, math.min(excess, 1000))
    local dropped, removed = {}, {}
    for _, id in ipairs(oldest) do
        if not keep[id] then
            removed[#removed + 1] = id
            if redis.pcall('HGET', batch.job_prefix .. id, 'status') == 'finished' then
                dropped[#dropped + 1] = batch.job_prefix .. id
                dropped[#dropped + 1] = batch.result_prefix .. id
            end
        end
    end
    if #dropped > 0 then redis.call('DEL', unpack(dropped)) end
    if #removed > 0 then redis.call('ZREM', KEYS[4], unpack(removed)) end
end

if #held > 0 then redis.call('RPUSH', KEYS[1], unpack(held)) end
return {quarantined, held}
