-- Requeue a job that a dead stock worker left in RQ's intermediate list.
--
-- KEYS 1 intermediate list, 2 queue
-- ARGV 1 job id
-- Reply: 1, or 0 if the list no longer has the job.

if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
redis.call('LPUSH', KEYS[2], ARGV[1])
return 1
