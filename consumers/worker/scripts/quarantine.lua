-- Quarantine keys that have another type than the worker needs.
--
-- KEYS keys
-- ARGV the type that each needs
-- Reply: the keys that were renamed.

local expected = {}
for n, key in ipairs(KEYS) do expected[key] = ARGV[n] end
return quarantine(expected)
