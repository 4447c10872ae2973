// An MCP client that logs in by itself, with the client-credentials provider of the SDK.
//
// The SDK is the job of mcp-v1.mjs and mcp-v2.mjs; what a user writes is the same for both.  The
// MCP server is played here, through the `fetch` option of the transport: it only wants a token.

import { answer } from "../jobs.mjs";

export async function connect({ Client, StreamableHTTPClientTransport, Provider, told }) {
  async function getToken(job) {
    const server = new PlayedServer(job.resource ?? job.audience, job.issuer);
    const provider = new Provider({
      clientId: job.id,
      clientSecret: job.key,
      expectedIssuer: job.issuer,
      ...(job.scope && { scope: job.scope }),
    });
    const transport = new StreamableHTTPClientTransport(server.url, {
      authProvider: provider,
      fetch: (url, init) => server.fetch(new URL(url), init),
    });
    const client = new Client({ name: "coatcheck-tests", version: "1.0.0" });
    await client.connect(transport);
    await client.close();
    return { token: server.token, scope: provider.tokens().scope };
  }
  await answer(getToken, told);
}

/** An MCP server that answers `initialize` to whoever brings a token, and remembers the token. */
class PlayedServer {
  constructor(resource, issuer) {
    this.url = new URL(`${resource}/mcp`);
    this.metadataUrl = `${this.url.origin}/.well-known/oauth-protected-resource${this.url.pathname}`;
    // RFC 9728 §2.  No `scopes_supported`: clients would ask for all of them.
    this.metadata = { resource, authorization_servers: [issuer] };
  }

  async fetch(url, init) {
    if (url.href === this.metadataUrl) {
      return Response.json(this.metadata);
    }
    if (url.href !== this.url.href) {
      return fetch(url, init);
    }
    const [scheme, token] = (new Headers(init.headers).get("authorization") ?? "").split(" ");
    if (scheme !== "Bearer") {
      const challenge = `Bearer resource_metadata="${this.metadataUrl}"`;
      return new Response(null, { status: 401, headers: { "WWW-Authenticate": challenge } });
    }
    this.token = token;
    if (init.method !== "POST") {
      return new Response(null, { status: 405 });
    }
    return this.reply(JSON.parse(init.body));
  }

  reply({ id, method, params }) {
    if (method !== "initialize") {
      return new Response(null, { status: 202 });
    }
    const serverInfo = { name: "played", version: "1.0.0" };
    const { protocolVersion } = params;
    return Response.json({
      jsonrpc: "2.0",
      id,
      result: { protocolVersion, capabilities: {}, serverInfo },
    });
  }
}
