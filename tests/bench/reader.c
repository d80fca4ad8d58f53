// A client that only reads: what the ground-truth server can give to anybody, since no client does less.
//   reader PORT STREAMS REQUESTS [pause_us=0]
// Reads whatever has come on any stream; with a pause it then waits, so that more comes at once and the server is woken
// less often. Prints one JSON object: CPU and wall time in s, and the reads. Ids of the requests: reader-0, reader-1 ...
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static const char body[] = "{\"model\":\"truth\",\"stream\":true}", last[] = "0\r\n\r\n";
static char buffer[1 << 20];

typedef struct Stream { int fd, kept; char end[sizeof last - 1]; } Stream; // the last bytes that came

static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
static double cpu(void) {
  struct rusage r; getrusage(RUSAGE_SELF, &r);
  return r.ru_utime.tv_sec + r.ru_stime.tv_sec + (r.ru_utime.tv_usec + r.ru_stime.tv_usec) / 1e6;
}
static void ask(Stream *s, int number) {
  char out[400];
  int n = snprintf(out, sizeof out, "POST /v1/chat/completions HTTP/1.1\r\nHost: rig\r\nX-Request-Id: reader-%d\r\n"
                   "Content-Length: %zu\r\n\r\n%s", number, sizeof body - 1, body);
  if (write(s->fd, out, n) != n) { perror("write"); exit(1); }
  s->kept = 0;
}
static int ended(Stream *s, const char *data, int n) { // whether the answer's last bytes came, in one read or in several
  const int want = sizeof s->end;
  if (n >= want) { memcpy(s->end, data + n - want, want); s->kept = want; }
  else {
    int old = s->kept + n > want ? want - n : s->kept;
    memmove(s->end, s->end + s->kept - old, old); memcpy(s->end + old, data, n); s->kept = old + n;
  }
  return s->kept == want && !memcmp(s->end, last, want);
}
int main(int argc, char **argv) {
  if (argc < 4) { fprintf(stderr, "usage: reader PORT STREAMS REQUESTS [pause_us]\n"); return 2; }
  int streams = atoi(argv[2]), requests = atoi(argv[3]), pause = argc > 4 ? atoi(argv[4]) : 0, sent = 0, open = 0;
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  Stream *all = calloc(streams, sizeof *all);
  int poll = epoll_create1(0);
  for (int i = 0; i < streams; i++) {
    all[i].fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(all[i].fd, (void *)&to, sizeof to)) { perror("connect"); return 1; }
    fcntl(all[i].fd, F_SETFL, O_NONBLOCK);
    struct epoll_event e = {EPOLLIN, {.ptr = &all[i]}}; epoll_ctl(poll, EPOLL_CTL_ADD, all[i].fd, &e);
  }
  long reads = 0;
  double began = now(), busy = cpu();
  for (; sent < requests && sent < streams; sent++, open++) ask(&all[sent], sent);
  struct epoll_event ready[64];
  while (open) {
    int n = epoll_wait(poll, ready, 64, -1);
    for (int i = 0; i < n; i++) {
      Stream *s = ready[i].data.ptr;
      ssize_t got = read(s->fd, buffer, sizeof buffer);
      if (got <= 0) { perror("read"); return 1; }
      reads++;
      if (!ended(s, buffer, got)) continue;
      if (sent < requests) ask(s, sent++); else open--;
    }
    if (pause) usleep(pause);
  }
  printf("{\"cpu_s\": %.6f, \"wall_s\": %.6f, \"reads\": %ld}\n", cpu() - busy, now() - began, reads);
  return 0;
}
