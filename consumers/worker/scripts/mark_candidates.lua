-- Make every reserved job of one owner a poison candidate, which is reserved alone from then on. Counts are kept.
--
-- KEYS 1 reserved list, 2 crash counts

for _, id in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do redis.call('HSETNX', KEYS[2], id, 0) end
redis.call('EXPIRE', KEYS[2], 604800)  -- a stock worker does not remove the counts of the jobs that it completes
