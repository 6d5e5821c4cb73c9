-- Read the fields of jobs, without their data and within limits.
--
-- KEYS jobs
-- ARGV 1 most bytes of one job's fields, names included
-- Reply for each job {names, values}, or false. A job is not read (false) if its key is not a hash, or if that has more
--      bytes than ARGV 1 or more than 1000 fields.

local found = {}
for n, key in ipairs(KEYS) do
    found[n] = false
    if redis.call('TYPE', key).ok == 'hash' and redis.call('HLEN', key) <= 1000 then
        local bytes, names = 0, {}
        for _, field in ipairs(redis.call('HKEYS', key)) do
            if field ~= 'data' then
                bytes = bytes + #field + redis.call('HSTRLEN', key, field)
                names[#names + 1] = field
            end
            if bytes > tonumber(ARGV[1]) then break end
        end
        if bytes <= tonumber(ARGV[1]) then
            found[n] = {names, #names > 0 and redis.call('HMGET', key, unpack(names)) or {}}
        end
    end
end
return found
