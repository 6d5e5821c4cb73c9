-- Requeue one reserved job at the tail of the queue and count that.
--
-- KEYS 1 reserved list, 2 queue, 3 counts
-- ARGV 1 job id
-- Reply: the count; 0 if the job is not reserved any more.

if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
redis.call('RPUSH', KEYS[2], ARGV[1])
local count = redis.call('HINCRBY', KEYS[3], ARGV[1], 1)
redis.call('EXPIRE', KEYS[3], 604800)  -- a stock worker does not remove the counts of the jobs that it completes
return count
