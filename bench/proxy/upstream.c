/* Fast upstream server for the proxy benchmark: one thread, epoll, no allocation per token.
 *
 * usage: upstream FIRST_PORT PORTS
 *
 * Management paths answer like a server with one small loaded model. A POST answers by its query and keeps the
 * connection open:
 *   ?t=N&r=R&b=B   a chunked NDJSON stream of N tokens, R writes per second, B tokens per write (B chunks in one write);
 *                  each token contains its write time in nanoseconds, as 16 hexadecimal digits, and up to seven letters
 *   ?s=1           one short JSON answer
 * A POST without a query gets the short answer too. Request bodies are read and discarded.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HEAD_MAX 16384
#define WHEEL 4096            /* slots of one millisecond */

typedef struct conn {
    int fd, head_len, in_body, closed;
    long body_left;
    char head[HEAD_MAX];
    long tokens_left;
    int burst;
    uint64_t period_ns, due_ns;
    struct conn *next, *prev; /* timer wheel slot list */
    int slot;
} conn;

static conn *wheel[WHEEL];
static uint64_t wheel_ms;
static char piece[1 << 20];
static int epoll_fd;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void unlink_timer(conn *c) {
    if (c->slot < 0) return;
    if (c->prev) c->prev->next = c->next; else wheel[c->slot] = c->next;
    if (c->next) c->next->prev = c->prev;
    c->next = c->prev = NULL;
    c->slot = -1;
}

static void set_timer(conn *c) {
    uint64_t ms = c->due_ns / 1000000;
    if (ms <= wheel_ms) ms = wheel_ms + 1;
    if (ms - wheel_ms >= WHEEL) ms = wheel_ms + WHEEL - 1;
    c->slot = (int)(ms % WHEEL);
    c->prev = NULL;
    c->next = wheel[c->slot];
    if (c->next) c->next->prev = c;
    wheel[c->slot] = c;
}

static void drop(conn *c) {
    if (c->closed) return;
    unlink_timer(c);
    close(c->fd);
    c->closed = 1;
}

static void send_all(conn *c, const char *data, size_t size) {
    while (size) {
        ssize_t n = send(c->fd, data, size, MSG_NOSIGNAL);
        if (n > 0) { data += n; size -= (size_t)n; continue; }
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) { /* a reader that is slower than this is not what is measured: wait for it */
            struct timespec t = {0, 200000};
            nanosleep(&t, NULL);
            continue;
        }
        drop(c);
        return;
    }
}

static void send_json(conn *c, const char *json) {
    int n = snprintf(piece, sizeof piece,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
        "Content-Length: %zu\r\n\r\n%s", strlen(json), json);
    send_all(c, piece, (size_t)n);
}

#define DIGEST "0000000000000000000000000000000000000000000000000000000000000001"

static const char *TAGS = "{\"models\":[{\"name\":\"bench:latest\",\"model\":\"bench:latest\",\"modified_at\":"
    "\"2024-01-01T00:00:00Z\",\"size\":1000000,\"digest\":\"" DIGEST "\",\"details\":{\"format\":\"gguf\",\"family\":"
    "\"llama\"}}]}";
static const char *SHOW = "{\"modelfile\":\"FROM /blobs/sha256-" DIGEST "\\n\",\"details\":{\"family\":\"llama\"},"
    "\"model_info\":{\"general.architecture\":\"llama\",\"llama.block_count\":2,\"llama.embedding_length\":64,"
    "\"llama.attention.head_count\":4,\"llama.attention.head_count_kv\":2,\"llama.context_length\":32768,"
    "\"llama.vocab_size\":256},\"tensors\":[],\"capabilities\":[\"completion\"]}";
static const char *PS = "{\"models\":[{\"name\":\"bench:latest\",\"model\":\"bench:latest\",\"size\":2000000,\"digest\":\""
    DIGEST "\",\"size_vram\":2000000,\"context_length\":32768,\"expires_at\":\"2318-01-01T00:00:00Z\"}]}";
static const char *SMALL = "{\"model\":\"bench:latest\",\"created_at\":\"2024-01-01T00:00:00Z\",\"message\":{\"role\":"
    "\"assistant\",\"content\":\"Hello there.\"},\"done\":true,\"done_reason\":\"stop\",\"prompt_eval_count\":12,"
    "\"eval_count\":4}";

static long query(const char *target, const char *name, long otherwise) {
    const char *at = strchr(target, '?');
    size_t n = strlen(name);
    while (at && *at && *at != ' ') {
        at++;
        if (!strncmp(at, name, n) && at[n] == '=') return atol(at + n + 1);
        at = strpbrk(at, "& ");
        if (at && *at == ' ') break;
    }
    return otherwise;
}

static int token_chunks(char *out, int count) {
    static char chunks[8][200]; /* tokens differ in length, as real ones do */
    static int sizes[8], next;
    unsigned long long now = (unsigned long long)now_ns();
    for (int v = 0; v < 8 && v < count; v++) {
        char line[160];
        int letters = next++ * 5 % 8;
        int n = snprintf(line, sizeof line, "{\"model\":\"bench:latest\",\"created_at\":\"2024-01-01T00:00:00Z\","
            "\"message\":{\"role\":\"assistant\",\"content\":\"%016llx%.*s\"},\"done\":false}\n", now, letters, "letters");
        sizes[v] = snprintf(chunks[v], sizeof chunks[v], "%x\r\n%.*s\r\n", n, n, line);
    }
    int end = 0;
    for (int i = 0; i < count; i++) {
        memcpy(out + end, chunks[i % 8], (size_t)sizes[i % 8]);
        end += sizes[i % 8];
    }
    return end;
}

static void next_tokens(conn *c) {
    int count = c->tokens_left < c->burst ? (int)c->tokens_left : c->burst;
    int n = token_chunks(piece, count);
    c->tokens_left -= count;
    if (!c->tokens_left) {
        const char *last = "{\"model\":\"bench:latest\",\"created_at\":\"2024-01-01T00:00:00Z\",\"message\":{\"role\":"
            "\"assistant\",\"content\":\"\"},\"done\":true,\"done_reason\":\"stop\",\"prompt_eval_count\":12,"
            "\"eval_count\":99}\n";
        n += sprintf(piece + n, "%zx\r\n%s\r\n0\r\n\r\n", strlen(last), last);
    }
    send_all(c, piece, (size_t)n);
    if (c->closed || !c->tokens_left) return;
    c->due_ns += c->period_ns;
    set_timer(c);
}

static void answer(conn *c) {
    char *target = strchr(c->head, ' ');
    if (!target) { drop(c); return; }
    target++;
    int is_post = !strncmp(c->head, "POST", 4);
    long tokens = is_post ? query(target, "t", 0) : 0;
    if (tokens > 0) {
        const char *head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT"
            "\r\nTransfer-Encoding: chunked\r\n\r\n";
        long rate = query(target, "r", 50);
        c->tokens_left = tokens;
        c->burst = (int)query(target, "b", 1);
        c->period_ns = rate > 0 ? 1000000000ull / (uint64_t)rate : 0;
        send_all(c, head, strlen(head));
        if (c->closed) return;
        if (!rate) { while (c->tokens_left && !c->closed) { int was = c->slot; next_tokens(c); unlink_timer(c); (void)was; } return; }
        c->due_ns = now_ns() + (uint64_t)(rand() % 1000) * c->period_ns / 1000; /* desynchronise the streams */
        set_timer(c);
        return;
    }
    if (!strncmp(target, "/api/tags", 9)) send_json(c, TAGS);
    else if (!strncmp(target, "/api/show", 9)) send_json(c, SHOW);
    else if (!strncmp(target, "/api/ps", 7)) send_json(c, PS);
    else if (!strncmp(target, "/api/version", 12)) send_json(c, "{\"version\":\"0.24.0\"}");
    else send_json(c, SMALL);
}

static void received(conn *c, char *data, long size) {
    while (size > 0 && !c->closed) {
        if (c->in_body) {
            long n = size < c->body_left ? size : c->body_left;
            data += n; size -= n; c->body_left -= n;
            if (!c->body_left) { c->in_body = 0; c->head_len = 0; answer(c); }
            continue;
        }
        long room = HEAD_MAX - 1 - c->head_len, n = size < room ? size : room;
        if (n <= 0) { drop(c); return; }
        memcpy(c->head + c->head_len, data, (size_t)n);
        int before = c->head_len > 3 ? c->head_len - 3 : 0;
        c->head_len += (int)n;
        c->head[c->head_len] = 0;
        char *end = strstr(c->head + before, "\r\n\r\n");
        if (!end) { data += n; size -= n; continue; }
        long head_size = end + 4 - c->head, old = c->head_len - n;
        data += head_size - old; size -= head_size - old;
        *end = 0;
        char *length = strcasestr(c->head, "\r\ncontent-length:");
        c->body_left = length ? atol(length + 17) : 0;
        if (c->body_left) { c->in_body = 1; continue; }
        c->head_len = 0;
        answer(c);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) { fprintf(stderr, "usage: upstream FIRST_PORT PORTS\n"); return 2; }
    int first = atoi(argv[1]), ports = atoi(argv[2]);
    signal(SIGPIPE, SIG_IGN);
    epoll_fd = epoll_create1(0);
    int listeners[64];
    for (int i = 0; i < ports && i < 64; i++) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)(first + i)),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        if (bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 8192)) { perror("listen"); return 1; }
        listeners[i] = fd;
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &listeners[i]};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
    }
    static char buffer[1 << 18];
    struct epoll_event events[512];
    wheel_ms = now_ns() / 1000000;
    for (;;) {
        int n = epoll_wait(epoll_fd, events, 512, 1);
        conn *dead[512];
        int dead_count = 0;
        for (int i = 0; i < n; i++) {
            int *listener = events[i].data.ptr;
            if (listener >= listeners && listener < listeners + 64) {
                int fd;
                while ((fd = accept4(*listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    int one = 1;
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    conn *c = calloc(1, sizeof *c);
                    c->fd = fd;
                    c->slot = -1;
                    struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = c};
                    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
                }
                continue;
            }
            conn *c = events[i].data.ptr;
            ssize_t got = recv(c->fd, buffer, sizeof buffer, 0);
            if (got > 0) received(c, buffer, got);
            else if (got == 0 || (errno != EAGAIN && errno != EINTR)) drop(c);
            if (c->closed) dead[dead_count++] = c;
        }
        for (int i = 0; i < dead_count; i++) free(dead[i]);
        uint64_t ms = now_ns() / 1000000;
        while (wheel_ms < ms) {
            wheel_ms++;
            conn *c = wheel[wheel_ms % WHEEL];
            wheel[wheel_ms % WHEEL] = NULL;
            while (c) {
                conn *next = c->next;
                c->next = c->prev = NULL;
                c->slot = -1;
                if (c->due_ns / 1000000 > wheel_ms) set_timer(c);
                else { next_tokens(c); if (c->closed) free(c); }
                c = next;
            }
        }
    }
}
