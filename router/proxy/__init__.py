"""The raw relay: requests that take a slot, from the client's socket to a server's and back, byte for byte.

Theory of operation
-------------------
Every connection to the endpoint starts here, under the relay's own `asyncio.Protocol`. Of each request only the head is
parsed, once, strictly, by llhttp, and of its body only the members that routing needs are read. A request for a model
gets its slot from the engine and its connection from a pool, and from then on bytes are bytes: what the server writes
is written to the client, and nothing of it is parsed but where it ends. All other requests are handed to aiohttp on the
same connection, one at a time, and the connection comes back when the answer is out.

What makes it fast is what it leaves out: no HTTP library on the way of a request that is relayed, no task, timer or
queue for a request, no copy of a large body, no JSON but the few members, no system call but two reads and two writes.
What is the same from one request of a client to the next (its head, what a model and `stream` come to, the head of the
reply) is known again by its bytes. Bytes leave before the books are closed, and nothing of a request refers back to it,
so that its memory is used again while it is warm.

What it never leaves out: each grant is given back exactly once; each request ends in the books exactly once; a client
that leaves stops its server's work wherever its request stands; nothing is retried once a byte of an answer is out, and
an answer that cannot be completed is never made to look complete.

    service      accepts, looks at deadlines, drains            desk        what all connections share
    connection   one client's connection, request by request    handover    aiohttp on the same connection
    intake       a request's body; reduced, glance: what it says of the request; usual: what came of one like it
    exchange     one leased request: lease, server, retries     early       the same for a body that is still coming
    reply        one reply on its way to the client             upstream    connections to servers, pooled
    framing      where bodies end                               heads       what heads say
    replies, pauses, parties, heartbeats, memory: small parts of these

Time: deadlines are looked at for all connections together, now and then; a timer each would cost more than a token.
Memory: a client is paused when its server does not take its body, a server when its client does not take its answer;
what waits between them is one read and the transport's buffer. Bodies are kept until the answer begins, for a retry.
"""
