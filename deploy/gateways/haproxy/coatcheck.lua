-- Asks Coatcheck about a request, and hands on what it says.  Used by haproxy.cfg:
--
--     http-request lua.coatcheck PATH-AND-QUERY
--
-- Afterwards txn.coatcheck_allowed is true, and the X-Coatcheck-* headers, txn.coatcheck_token and
-- txn.coatcheck_uri are set; or the request was answered.  Nothing is remembered between requests.
-- HAProxy does other work while it waits.

-- A listener of haproxy.cfg.
local WHERE = "abns@coatcheck"

-- What belongs to the body, which goes to the API alone, to this connection, or to the answer.
local NOT_ASKED = {
    ["connection"] = true,
    ["content-encoding"] = true,
    ["content-length"] = true,
    ["expect"] = true,
    ["host"] = true,
    ["keep-alive"] = true,
    ["te"] = true,
    ["trailer"] = true,
    ["transfer-encoding"] = true,
    ["upgrade"] = true,
}

local function first(headers, name)
    return headers[name] and headers[name][0]
end

local function question(txn)
    local asked = {}
    for name, values in pairs(txn.http:req_get_headers()) do
        if not NOT_ASKED[name] then
            asked[name] = {}
            for index = 0, #values do
                table.insert(asked[name], values[index])
            end
        end
    end
    asked["x-original-method"] = { txn.f:method() }
    asked["x-original-uri"] = { txn.f:pathq() }
    return asked
end

local function let_in(txn, told)
    for name, values in pairs(told) do
        if name:find("^x%-coatcheck%-") then
            txn.http:req_set_header(name, values[0])
        end
    end
    local uri = first(told, "x-coatcheck-uri")
    txn:set_var("txn.coatcheck_uri", uri)
    txn:set_var("txn.coatcheck_private", first(told, "x-coatcheck-private") == "true")
    txn:set_var("txn.coatcheck_key", first(told, "x-coatcheck-key"))
    if told["authorization"] then
        txn:set_var("txn.coatcheck_token", first(told, "authorization"))
    end
    txn:set_var("txn.coatcheck_allowed", uri ~= nil)
end

local function refuse(txn, answer)
    local reply = txn:reply({ status = answer.status, reason = answer.reason })
    for name, values in pairs(answer.headers) do
        if name ~= "connection" and name ~= "content-length" and name ~= "transfer-encoding" then
            for index = 0, #values do
                reply:add_header(name, values[index])
            end
        end
    end
    reply:set_body(answer.body)
    txn:done(reply)
end

core.register_action("coatcheck", { "http-req" }, function(txn, path)
    local answer = core.httpclient():get({
        url = "http://coatcheck" .. path,
        dst = WHERE,
        headers = question(txn),
    })
    if answer.status == 204 then
        let_in(txn, answer.headers)
    elseif answer.headers and first(answer.headers, "content-type") == "application/problem+json" then
        refuse(txn, answer)
    end
    -- Anything else is no decision.
end, 1)
