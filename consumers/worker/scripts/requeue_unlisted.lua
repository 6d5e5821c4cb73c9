-- Requeue a job whose status is queued, but that has been in no list for ARGV 2 seconds. The first call notes the time.
--
-- KEYS 1 queue, 2 job, 3 orphans (job id to the second in which it was first seen)
-- ARGV 1 job id, 2 seconds after which it is requeued
-- Reply: 1 if it was requeued, else 0.
--
-- The clock is Redis', since workers on several hosts make these calls.

quarantine({[KEYS[3]] = 'hash'})
local now = tonumber(redis.call('TIME')[1])
local seen = redis.call('HGET', KEYS[3], ARGV[1])
if not seen or (tonumber(seen) or 0) > now then  -- never, or before the clock was set back
    redis.call('HSET', KEYS[3], ARGV[1], now)
    redis.call('EXPIRE', KEYS[3], 600)
    return 0
end
if now - (tonumber(seen) or 0) < tonumber(ARGV[2]) then return 0 end
redis.call('HDEL', KEYS[3], ARGV[1])
if redis.call('HGET', KEYS[2], 'status') ~= 'queued' or redis.call('LPOS', KEYS[1], ARGV[1]) then return 0 end
redis.call('LPUSH', KEYS[1], ARGV[1])
return 1
