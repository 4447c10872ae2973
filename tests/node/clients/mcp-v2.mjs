// @modelcontextprotocol/client, version 2 of the same SDK.

import {
  Client,
  ClientCredentialsProvider,
  StreamableHTTPClientTransport,
} from "@modelcontextprotocol/client";

import { connect } from "./mcp.mjs";

// `code` is the error code, `message` the sentence.
const told = (error) => ({ code: error.code, text: error.message });

await connect({ Client, StreamableHTTPClientTransport, Provider: ClientCredentialsProvider, told });
