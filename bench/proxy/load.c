/* Load generator for the proxy benchmark: one thread, epoll; prints one line of JSON.
 *
 * usage: load PORT FILE closed CONNECTIONS COUNT       COUNT requests, one after another on each connection
 *        load PORT FILE paced RATE SECONDS             open loop: RATE requests per second over 8 connections
 *        load PORT FILE first RATE SECONDS             the same with streams of one token; see `first_us`
 *        load PORT FILE streams COUNT TOKENS           COUNT concurrent streams of TOKENS tokens, each to its end
 *
 * FILE has the requests, which are sent in turn: for each a line with its length in bytes, then its bytes.
 * Replies are read completely (chunked or Content-Length); a status other than 200 or a broken reply counts as failed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
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

enum { HEAD, SIZED, SIZE_LINE, DATA, DATA_END, LAST, DONE };
enum { CLOSED, PACED, STREAMS, FIRST };

typedef struct {
    int fd, state, head_len, line_len, busy, index;
    char head[8192], line[1024];
    long left;
    uint64_t sent_ns, first_ns;
    long tokens, request_len;
    int ended, was_full;
    const char *out;
    long out_left;
} conn;

static int mode, port, epoll_fd, connections;
#define VARIANTS_MAX 64
static char *requests[VARIANTS_MAX];
static long request_len[VARIANTS_MAX];
static int variants, variant;
static long done_count, failed, tokens, expected_tokens;
static uint64_t bytes_in, bytes_out; /* out: of requests that were answered */
static conn *conns;

typedef struct { double *v; long n, room; } samples;
static samples latency, lag, first_token;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void note(samples *s, double value) {
    if (s->n == s->room) { s->room = s->room ? s->room * 2 : 4096; s->v = realloc(s->v, (size_t)s->room * sizeof *s->v); }
    s->v[s->n++] = value;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double quantile(samples *s, double q) {
    if (!s->n) return 0;
    qsort(s->v, (size_t)s->n, sizeof *s->v, by_value);
    long at = (long)(q * (double)(s->n - 1) + 0.5);
    return s->v[at];
}

static void open_conn(conn *c) {
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    int one = 1;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                            .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (connect(c->fd, (struct sockaddr *)&a, sizeof a)) { perror("connect"); exit(1); }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &e);
    c->state = HEAD;
    c->head_len = c->line_len = 0;
    c->busy = 0;
}

static void close_conn(conn *c) { close(c->fd); c->fd = -1; }

static void push(conn *c) {
    while (c->out_left) {
        ssize_t n = send(c->fd, c->out, (size_t)c->out_left, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN) {
            struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
            epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
            c->was_full = 1;
            return;
        }
        if (n < 0) return;
        c->out += n; c->out_left -= n;
    }
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    if (c->was_full) epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
    c->was_full = 0;
}

static void ask(conn *c) {
    c->busy = 1;
    c->state = HEAD;
    c->head_len = c->line_len = 0;
    c->tokens = 0;
    c->ended = 0;
    c->sent_ns = now_ns();
    c->first_ns = 0;
    c->out = requests[variant];
    c->out_left = request_len[variant];
    variant = (variant + 1) % variants;
    c->was_full = 0;
    c->request_len = c->out_left;
    push(c);
}

static void line_ends(conn *c, uint64_t now) {
    static long place; /* lines are alike, so try the previous offset first */
    c->line[c->line_len] = 0;
    char *at = place < c->line_len && !memcmp(c->line + place, "\"content\":\"", 11) ? c->line + place
        : strstr(c->line, "\"content\":\"");
    if (at) place = at - c->line;
    if (at && c->line + c->line_len > at + 27 && isxdigit((unsigned char)at[26])) { /* letters may follow */
        uint64_t written = strtoull(at + 11, NULL, 16);
        if (!c->first_ns) { c->first_ns = now; note(&first_token, (double)(now - c->sent_ns) / 1e3); }
        c->tokens++;
        tokens++;
        if (tokens % 7 == 0) note(&lag, (double)(now - written) / 1e3);
    }
    int is_token = c->line_len > 13 && !memcmp(c->line + c->line_len - 13, "\"done\":false}", 13);
    if (!is_token && strstr(c->line, "\"done\":true")) c->ended = 1;
    c->line_len = 0;
}

static void payload(conn *c, const char *data, long size, uint64_t now) {
    if (mode != STREAMS && mode != FIRST) return;
    while (size) {
        const char *end = memchr(data, '\n', (size_t)size);
        long n = end ? end - data : size;
        long room = (long)sizeof c->line - 1 - c->line_len;
        if (n > room) n = room;
        memcpy(c->line + c->line_len, data, (size_t)n);
        c->line_len += (int)n;
        if (end) { line_ends(c, now); n = end - data + 1; }
        data += n; size -= n;
    }
}

static void head_ends(conn *c) {
    c->head[c->head_len] = 0;
    if (strncmp(c->head + 9, "200", 3)) { c->ended = -1; }
    char *length = strcasestr(c->head, "\r\ncontent-length:");
    if (strcasestr(c->head, "\r\ntransfer-encoding:")) { c->state = SIZE_LINE; c->head_len = 0; }
    else { c->left = length ? atol(length + 17) : 0; c->state = c->left ? SIZED : DONE; }
}

/* Parses reply bytes; returns the number consumed and sets *whole when a reply is complete. */
static long take(conn *c, const char *data, long size, uint64_t now, int *whole) {
    long i = 0;
    static char hex[64];
    while (i < size && c->state != DONE) {
        switch (c->state) {
        case HEAD: {
            c->head[c->head_len++] = data[i++];
            if (c->head_len >= 4 && !memcmp(c->head + c->head_len - 4, "\r\n\r\n", 4)) head_ends(c);
            else if (c->head_len == sizeof c->head - 1) { c->ended = -1; c->state = DONE; }
            break;
        }
        case SIZED: case DATA: {
            long n = size - i < c->left ? size - i : c->left;
            payload(c, data + i, n, now);
            i += n; c->left -= n;
            if (!c->left) { if (c->state == SIZED) c->state = DONE; else { c->state = DATA_END; c->left = 2; } }
            break;
        }
        case DATA_END: { long n = size - i < c->left ? size - i : c->left; i += n; c->left -= n; if (!c->left) { c->state = SIZE_LINE; c->left = 0; c->head_len = 0; } break; }
        case SIZE_LINE: {
            c->head[c->head_len++ % 64] = data[i];
            if (data[i++] == '\n') {
                int n = c->head_len < 63 ? c->head_len : 63;
                memcpy(hex, c->head, (size_t)n); hex[n] = 0;
                c->left = strtol(hex, NULL, 16);
                c->head_len = 0;
                if (c->left) c->state = DATA; else { c->state = LAST; c->left = 2; }
            }
            break;
        }
        case LAST: { long n = size - i < c->left ? size - i : c->left; i += n; c->left -= n; if (!c->left) c->state = DONE; break; }
        }
    }
    *whole = c->state == DONE;
    return i;
}

static void finished(conn *c, uint64_t now) {
    int good = c->ended >= 0 && (mode != STREAMS || (c->ended == 1 && c->tokens == expected_tokens));
    if (good) { done_count++; bytes_out += (uint64_t)c->request_len; } else failed++;
    note(&latency, (double)(now - c->sent_ns) / 1e3);
    c->busy = 0;
}

static void read_requests(const char *path) {
    FILE *file = fopen(path, "rb");
    long size;
    if (!file) { perror(path); exit(2); }
    while (variants < VARIANTS_MAX && fscanf(file, "%ld", &size) == 1 && fgetc(file) == '\n') {
        char *text = malloc((size_t)size);
        if (!text || fread(text, 1, (size_t)size, file) != (size_t)size) { fprintf(stderr, "%s is cut short\n", path); exit(2); }
        requests[variants] = text;
        request_len[variants++] = size;
    }
    fclose(file);
    if (!variants) { fprintf(stderr, "%s has no request\n", path); exit(2); }
}

int main(int argc, char **argv) {
    if (argc < 6) { fprintf(stderr, "see the head of load.c\n"); return 2; }
    signal(SIGPIPE, SIG_IGN);
    port = atoi(argv[1]);
    read_requests(argv[2]);
    const char *what = argv[3];
    double seconds = 1e9, rate = 0;
    mode = !strcmp(what, "paced") ? PACED : !strcmp(what, "streams") ? STREAMS : !strcmp(what, "first") ? FIRST : CLOSED;
    connections = atoi(argv[4]);
    int paced = mode == PACED || mode == FIRST;
    long left = 0; /* to be sent */
    if (paced) { rate = atof(argv[4]); seconds = atof(argv[5]); connections = 8; }
    if (mode == STREAMS) expected_tokens = atol(argv[5]);
    if (mode == CLOSED) left = atol(argv[5]) - connections;

    epoll_fd = epoll_create1(0);
    conns = calloc((size_t)connections, sizeof *conns);
    uint64_t start;
    for (int i = 0; i < connections; i++) { conns[i].index = i; open_conn(&conns[i]); }
    start = now_ns();
    uint64_t end = start + (uint64_t)(seconds * 1e9), next = start;
    int turn = 0, open_count = connections;
    if (!paced) for (int i = 0; i < connections; i++) ask(&conns[i]);
    static char buffer[1 << 18];
    struct epoll_event events[512];
    for (;;) {
        uint64_t now = now_ns();
        if (now >= end || !open_count) break;
        if (paced) {
            while (now >= next) {
                conn *c = &conns[turn++ % connections];
                if (!c->busy) ask(c); else failed++;
                next += (uint64_t)(1e9 / rate);
            }
        }
        int n = epoll_wait(epoll_fd, events, 512, paced ? 1 : 100);
        now = now_ns();
        if (!paced && !n && now - start > 600ull * 1000000000ull) break;
        for (int i = 0; i < n; i++) {
            conn *c = events[i].data.ptr;
            if (c->fd < 0) continue;
            if (events[i].events & EPOLLOUT) push(c);
            if (!(events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) continue;
            ssize_t got = recv(c->fd, buffer, sizeof buffer, MSG_DONTWAIT);
            if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
            if (got <= 0) {
                if (c->busy) { failed++; c->busy = 0; }
                close_conn(c);
                if (paced) open_conn(c);
                else if (mode == CLOSED && left > 0) { left--; open_conn(c); ask(c); }
                else open_count--;
                continue;
            }
            now = now_ns();
            bytes_in += (uint64_t)got;
            int whole = 0;
            take(c, buffer, got, now, &whole);
            if (whole) {
                finished(c, now);
                if (mode == STREAMS || (mode == CLOSED && left <= 0)) { close_conn(c); open_count--; }
                else if (mode == CLOSED) { left--; ask(c); }
            }
        }
    }
    double elapsed = (double)(now_ns() - start) / 1e9;
    printf("{\"seconds\":%.4f,\"done\":%ld,\"failed\":%ld,\"per_second\":%.2f,\"tokens\":%ld,\"tokens_per_second\":%.1f,"
        "\"latency_us\":{\"p50\":%.1f,\"p99\":%.1f},\"first_us\":{\"p50\":%.1f,\"p99\":%.1f},"
        "\"lag_us\":{\"p50\":%.1f,\"p99\":%.1f},\"sent_mb_per_second\":%.1f}\n",
        elapsed, done_count, failed, (double)done_count / elapsed, tokens, (double)tokens / elapsed,
        quantile(&latency, 0.5), quantile(&latency, 0.99), quantile(&first_token, 0.5), quantile(&first_token, 0.99),
        quantile(&lag, 0.5), quantile(&lag, 0.99), (double)bytes_out / elapsed / 1e6);
    return failed ? 1 : 0;
}
