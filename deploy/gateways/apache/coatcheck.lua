-- Asks Coatcheck about a request before Apache hands it to the API.  Used by coatcheck.conf.
--
-- The thread waits for the answer, at most http.TIMEOUT seconds for each step.  Nothing is
-- remembered between requests.  If this script fails, Apache answers 500: nobody gets in.

require "apache2"
local http = require "socket.http"
local ltn12 = require "ltn12"

-- &scope=widgets:read would ask for a permission, too.
local ASK = "http://127.0.0.1:8000/authz/verify"
    .. "?audience=https%3A%2F%2Fapi.example.com&environment=live&for=apache&token=true"
http.TIMEOUT = 5

-- The one path that is open to everybody: it tells where to get a token.
local METADATA = "/.well-known/oauth-protected-resource"

-- The gateway's own API key, where it cannot be one of COATCHECK_TRUSTED_PROXIES.
local SERVICE_KEY = os.getenv("COATCHECK_SERVICE_KEY")

-- What belongs to the body, which goes to the API alone, or to this connection.
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

-- What the API never sees of a caller: the credential, and pages whose URL may hold a key.
-- X-Acme-Key stands for your product's own header, if it has one.
local DROPPED = {
    ["authorization"] = true,
    ["referer"] = true,
    ["x-acme-key"] = true,
    ["x-api-key"] = true,
}

local UNAVAILABLE = '{"type":"about:blank","title":"Service Unavailable","status":503,'
    .. '"detail":"The credential cannot be checked now: try again.","code":"issuer_unavailable"}'

-- Only Coatcheck says who is calling, in any spelling: WSGI reads _ as -, others any sign.
local function is_ours(name)
    return name:find("^x[^a-z0-9]*coatcheck") ~= nil
end

-- Addresses and URLs that anybody can invent.
local function is_claimed(name)
    return name:find("^x%-forwarded%-") ~= nil or name:find("^x%-original%-") ~= nil
end

local function question(r, headers)
    local asked = {}
    for name, value in pairs(headers) do
        local lowered = name:lower()
        if not (NOT_ASKED[lowered] or is_ours(lowered) or is_claimed(lowered)) then
            asked[lowered] = value
        end
    end
    asked["x-original-method"] = r.method
    asked["x-original-uri"] = r.unparsed_uri
    -- Set, not added: what a caller wrote into it decides nothing.
    asked["x-forwarded-for"] = r.useragent_ip
    asked["x-coatcheck-service-key"] = SERVICE_KEY
    return asked
end

local function ask(headers)
    local parts = {}
    local done, status, told = http.request {
        url = ASK,
        headers = headers,
        redirect = false,
        sink = ltn12.sink.table(parts),
    }
    return done and status, told, table.concat(parts)
end

local function let_in(r, headers, told)
    local said = { ["x-forwarded-for"] = r.useragent_ip }
    for name, value in pairs(told) do
        if is_ours(name) or name == "authorization" then
            said[name] = value
        end
    end
    -- A script can set a header and take none away.  The proxy takes away what Connection names
    -- (RFC 9110 section 7.6.1); what a caller wrote into that is forgotten.
    local dropped = { "close" }
    for name in pairs(headers) do
        local lowered = name:lower()
        local goes = DROPPED[lowered] or is_ours(lowered) or is_claimed(lowered)
        if goes and not said[lowered] then
            table.insert(dropped, name)
        end
    end
    -- Only WebSockets may leave HTTP: by h2c a caller would reach the API past this gateway.  The
    -- proxy looks for one word among several.
    if (r.headers_in["Upgrade"] or ""):lower() ~= "websocket" then
        table.insert(dropped, "Upgrade")
        said["upgrade"] = "nothing"
    end
    said["connection"] = table.concat(dropped, ", ")
    for name, value in pairs(said) do
        r.headers_in[name] = value
    end
    -- The URI as it came, without `api_key`: `nocanon` has put it behind the API's address.
    local came, uri = r.unparsed_uri, told["x-coatcheck-uri"]
    assert(r.filename:sub(-#came) == came, "ProxyPass / URL/ nocanon")
    r.filename = r.filename:sub(1, -#came - 1) .. uri
    r.args = uri:match("%?(.*)") or ""
    r.notes["coatcheck_key"] = told["x-coatcheck-key"]
    r.notes["coatcheck_private"] = told["x-coatcheck-private"]
    return apache2.OK
end

local function refuse(r, status, told, body)
    r.status = status
    r.content_type = "application/problem+json"
    for _, name in ipairs { "WWW-Authenticate", "Retry-After", "Cache-Control", "Referrer-Policy" } do
        local value = told[name:lower()]
        if value then
            r.err_headers_out[name] = value
        end
    end
    r:puts(body)
    return apache2.DONE
end

function coatcheck(r)
    if r.uri == METADATA and not r.filename:find("^proxy:") then
        return apache2.OK
    end
    local headers = r:headers_in_table()
    local status, told, body = ask(question(r, headers))
    if status == 204 then
        return let_in(r, headers, told)
    end
    if status and told["content-type"] == "application/problem+json" then
        return refuse(r, status, told, body)
    end
    -- No decision.
    return refuse(r, 503, { ["retry-after"] = "5", ["cache-control"] = "no-store" }, UNAVAILABLE)
end
