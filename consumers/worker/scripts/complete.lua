-- Complete deliveries of one owner: acknowledge them to their producers, release them, and finish their jobs or move
-- them to the failed registry.
--
-- KEYS 1 reserved list, 2 crash counts, 3 timeout counts, 4 finished registry, 5 failed registry, 6 worker,
--      7 and following: the acknowledgements of each source, a hash
-- ARGV 1 a JSON object, 2 and following: calls for failed jobs. Fields of the object:
--      job_prefix, result_prefix   prefixes of RQ's keys
--      released                    ids of all these jobs, in the order of their reservation
--      acknowledgements            for each key from 7 on a list: job id, text, job id, text ...
--      acknowledged_seconds        expiry of the acknowledgements
--      forgotten                   ids of finished jobs whose keys are deleted
--      finished                    finished jobs that are kept, each an object:
--          id, ttl                 ttl in seconds; negative: no expiry
--          result                  the return value as RQ encodes it
--      failed                      jobs for the failed registry, each an object:
--          id, ttl                 ttl in seconds; negative: no expiry
--          fields                  names and values to write to the job; empty: only add the job to the registry
--          result                  names and values of RQ's result
--          expires_results         true: results expire like the job; else their expiry is not changed
--          is_placeholder          true: first delete the job's fields
--          keep_reserved           true: the job holds a slot of a rate limit
--          call                    index in ARGV of the call to write; absent: the job's call is not changed
--      job, result                 fields that are the same for every finished job, and for every result
--      now                         seconds since the epoch, by the worker's clock
--      kept_jobs                   maximum number of finished jobs with an expiry
--      waited_for_seconds          minimum expiry of a job that has dependents
-- Reply {keys quarantined, ids that are still reserved, errors}. The jobs that are still reserved have dependents or a
--      rate limit slot: the owner has RQ process them and then releases them. The errors name forbidden commands.
--
-- Errors on a job's own keys do not end the script (pcall). They are ignored, except if a command is forbidden. Each
-- command takes microseconds, so commands for all jobs at once are preferred to commands for each job.

local errors, is_known = {}, {}
local function attempt(command, ...)
    local reply = redis.pcall(command, ...)
    local error = forbidden(reply, string.lower(command))
    if error and not is_known[error] then
        is_known[error] = true
        errors[#errors + 1] = error
    end
    return reply, error
end

local batch = cjson.decode(ARGV[1])
local expected = {[KEYS[1]] = 'list', [KEYS[2]] = 'hash', [KEYS[3]] = 'hash', [KEYS[4]] = 'zset', [KEYS[5]] = 'zset',
    [KEYS[6]] = 'hash'}
for n = 7, #KEYS do expected[KEYS[n]] = 'hash' end
local quarantined = quarantine(expected)

local now = redis.call('TIME')[1]  -- relays compare the time with Redis' clock
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

-- Dependents can be added to a job until its status changes, which this script does.
local dependents, waited_for, keep_reserved = {}, {}, {}
for n, id in ipairs(released) do dependents[n] = batch.job_prefix .. id .. ':dependents' end
if #dependents > 0 and redis.call('EXISTS', unpack(dependents)) > 0 then
    for n, id in ipairs(released) do waited_for[id] = redis.call('EXISTS', dependents[n]) == 1 end
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
    if waited_for[id] and redis.call('EXISTS', job) == 1 then
        attempt('HSET', job, unpack(batch.job))
        expire(id, batch.waited_for_seconds)
        keep_reserved[#keep_reserved + 1] = id
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
        attempt('HSET', job, unpack(batch.job))
        attempt('XADD', results, 'MAXLEN', 10, '*', 'type', '1', 'return_value', one.result, unpack(batch.result))
        if ttl > 0 then
            redis.call('EXPIRE', results, ttl)
            expire(id, ttl)
            if waited_for[id] then expire(id, math.max(ttl, batch.waited_for_seconds)) end
        else
            redis.call('PERSIST', results)
            redis.call('PERSIST', job)
        end
        redis.call('ZADD', KEYS[4], ttl > 0 and batch.now + ttl or '+inf', id)
        if waited_for[id] then keep_reserved[#keep_reserved + 1] = id end
    end
end
if #succeeded > 0 then redis.call('ZREM', KEYS[5], unpack(succeeded)) end

for _, one in ipairs(batch.failed) do
    local id, ttl = one.id, one.ttl
    local job, results = batch.job_prefix .. id, batch.result_prefix .. id
    if #one.fields > 0 then
        if one.is_placeholder or redis.call('TYPE', job).ok ~= 'hash' then redis.call('DEL', job) end
        redis.call('HSET', job, unpack(one.fields))
        if one.call then redis.call('HSET', job, 'data', ARGV[one.call]) end
        redis.call('PERSIST', job)  -- it had an expiry in the queue
        local added, refused = attempt('XADD', results, 'MAXLEN', '~', 10, '*', unpack(one.result))
        if type(added) == 'table' and added.err and not refused then
            redis.call('DEL', results)
            redis.call('XADD', results, '*', unpack(one.result))
        end
        if ttl >= 0 then
            local stays = one.keep_reserved or waited_for[id]
            expire(id, stays and math.max(ttl, batch.waited_for_seconds) or ttl)
        end
        if one.expires_results then
            if ttl >= 0 then redis.call('EXPIRE', results, ttl) else redis.call('PERSIST', results) end
        end
    end
    redis.call('ZADD', KEYS[5], ttl >= 0 and batch.now + ttl or -1, id)
    if one.keep_reserved or (waited_for[id] and #one.fields > 0) then keep_reserved[#keep_reserved + 1] = id end
end

-- Jobs without an expiry do not count. A batch adds less than a thousand jobs.
local excess = #succeeded > 0 and redis.call('ZCOUNT', KEYS[4], 0, '(+inf') - batch.kept_jobs or 0
if excess > 0 then
    local keep = {}
    for _, id in ipairs(keep_reserved) do keep[id] = true end
    local oldest = redis.call('ZRANGEBYSCORE', KEYS[4], 0, '(+inf', 'LIMIT', 0, math.min(excess, 1000))
    local dropped, removed = {}, {}
    for _, id in ipairs(oldest) do
        if not keep[id] then
            removed[#removed + 1] = id
            if attempt('HGET', batch.job_prefix .. id, 'status') == 'finished' then
                dropped[#dropped + 1] = batch.job_prefix .. id
                dropped[#dropped + 1] = batch.result_prefix .. id
            end
        end
    end
    if #dropped > 0 then redis.call('DEL', unpack(dropped)) end
    if #removed > 0 then redis.call('ZREM', KEYS[4], unpack(removed)) end
end

if #keep_reserved > 0 then redis.call('RPUSH', KEYS[1], unpack(keep_reserved)) end
return {quarantined, keep_reserved, errors}
