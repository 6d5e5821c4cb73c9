-- Requeue a job that has expired in RQ's started registry, since its stock worker died.
--
-- KEYS 1 started registry, 2 queue, 3 job
-- ARGV 1 member of the registry, 2 job id
-- Reply: 1, or 0 if the registry no longer has the job or the job's key is not a hash.

if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return 0 end
if redis.call('TYPE', KEYS[3]).ok ~= 'hash' then return 0 end
redis.call('HSET', KEYS[3], 'status', 'queued')
redis.call('LPUSH', KEYS[2], ARGV[2])
return 1
