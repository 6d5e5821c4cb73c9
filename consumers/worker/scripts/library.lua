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

-- Return the error in `reply`, a reply of redis.pcall, if the access list forbids this user the command or a key; else
-- nil. Redis does not name the command that it forbids in a script, in contrast to Valkey, so the error does here.
local function forbidden(reply, command)
    local text = type(reply) == 'table' and reply.err or ''
    if string.find(text, "can't run this command", 1, true) then
        return "NOPERM this user has no permissions to run the '" .. command .. "' command"
    end
    local found = string.find(string.lower(text), 'no permissions', 1, true) or string.find(text, "can't access", 1, true)
    return found and text or nil
end
