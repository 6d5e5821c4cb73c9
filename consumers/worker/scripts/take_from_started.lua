-- Requeue a job that a dead stock worker let expire in RQ's started registry.
--
-- KEYS 1 started registry, 2 queue, 3 job
-- ARGV 1 member of the registry, 2 job id
-- Reply: 1, or 0 if it is not there any more.

if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return 0 end
if redis.call('TYPE', KEYS[3]).ok ~= 'hash' then return 0 end
redis.call('HSET', KEYS[3], 'status', 'queued')
redis.call('LPUSH', KEYS[2], ARGV[2])
return 1
