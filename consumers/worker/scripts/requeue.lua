-- Requeue all reserved jobs of one owner at the front of the queue, in the order in which they were taken.
--
-- KEYS 1 reserved list, 2 queue
-- Reply: the number of jobs.

local jobs = 0
while redis.call('LMOVE', KEYS[1], KEYS[2], 'RIGHT', 'LEFT') do jobs = jobs + 1 end
return jobs
