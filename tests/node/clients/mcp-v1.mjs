// @modelcontextprotocol/sdk, version 1.

import { ClientCredentialsProvider } from "@modelcontextprotocol/sdk/client/auth-extensions.js";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";

import { connect } from "./mcp.mjs";

// One class per error code, the sentence as `message`.
const told = (error) => ({ code: error.errorCode, text: error.message });

await connect({ Client, StreamableHTTPClientTransport, Provider: ClientCredentialsProvider, told });
