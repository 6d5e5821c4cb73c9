-- Functions for all scripts. The loader puts this file before each of them.

-- Rename every key that has another type than the one it needs to <key>:quarantined.
-- `expected` maps keys to types. Returns the keys that were renamed.
local function quarantine(expected)
    local renamed = {}
    for key, kind in pairs(expected) do
        local found = redis.call('TYPE', key).ok
        if found ~= 'none' and found ~= kind then
            redis.call('RENAME', key, key .. ':quarantined')
            renamed[#renamed + 1] = key
        end
    end
    return renamed
end
