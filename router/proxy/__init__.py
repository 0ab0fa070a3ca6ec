"""The raw proxy: requests that take a slot, from the client's socket to a server's and back, byte for byte.

Theory of operation
-------------------
Every connection to the endpoint starts here, under the proxy's own `asyncio.Protocol`. Of each request only the head is
parsed, once, strictly, by llhttp, and of its body only the members that routing needs. A request for a model passes
admission, gets a slot from the controller and a connection from a pool. After that the proxy only moves bytes: what the
server writes is written to the client, and only its end is looked for. All other requests are handed to aiohttp on the
same connection, one at a time, and the connection returns once the response is out.

It is fast because of what it leaves out: no HTTP library on the path of a relayed request; no task, timer or queue per
request; no copy of a large body; no JSON but the few members; no system calls but two reads and two writes. What
repeats from one request of a client to the next is cached by its bytes: request heads with everything derived from
them, reply heads, and routing plans by model and `stream`. Bytes leave before the request is recorded, and no reference
cycles remain after a request, so that its memory is reused while it is in the CPU's cache.

Invariants: each grant is released exactly once. Each request ends in the access log exactly once. A client that leaves
stops its server's work in every phase. Nothing is retried once a byte of a response is out, and a response that cannot
be completed is never made to look complete.

    server             accepts, checks deadlines, drains      context          what all connections share
    client_connection  one connection, request by request     aiohttp_bridge   aiohttp on the same connection
    request_body       reads a request's body                 head_cache       what is known of a head in advance
    exchange           one request: slot, server, retries     streaming_upload the same while its body still comes
    response_stream    one reply on its way to the client     upstream_pool    connections to servers
    heartbeat, flow_control, memory_trim, interfaces          small parts of these

Time: the deadlines of all connections are checked together, periodically; a timer each would cost more than a token.
Memory: reading from a client pauses while its server does not take its body, and reading from a server while its client
does not take its response; only one read and the transport's buffer wait between them. Bodies are kept until the
response begins, for a retry.
"""
