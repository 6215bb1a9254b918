/* A slow disk for every process that loads this first (LD_PRELOAD): each fsync and fdatasync takes
 * SLOW_FSYNC_US microseconds longer. What it does is done; only the answer is late.
 *
 * A file named by SLOW_FSYNC_COUNT gets one byte for each, so that it can be seen that it works.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

typedef int (*sync_function)(int);

static void be_slow(void) {
  const char *wanted = getenv("SLOW_FSYNC_US"), *count = getenv("SLOW_FSYNC_COUNT");
  long left_us = wanted ? atol(wanted) : 0;
  int before = errno;
  struct timespec pause = {left_us / 1000000, (left_us % 1000000) * 1000};
  while (nanosleep(&pause, &pause) && errno == EINTR) {
  }
  if (count) {
    int file = open(count, O_WRONLY | O_APPEND | O_CLOEXEC);
    if (file >= 0) {
      if (write(file, ".", 1) < 0) { /* Counting is not what matters. */
      }
      close(file);
    }
  }
  errno = before;
}

int fsync(int file) {
  sync_function real = (sync_function)dlsym(RTLD_NEXT, "fsync");
  int result = real(file);
  be_slow();
  return result;
}

int fdatasync(int file) {
  sync_function real = (sync_function)dlsym(RTLD_NEXT, "fdatasync");
  int result = real(file);
  be_slow();
  return result;
}
