/* A clock that jumps, for one program and those that it starts: LD_PRELOAD this library.
 *
 * FEDPHD_CLOCK names a file with an int64: nanoseconds that are added to CLOCK_REALTIME. It is
 * mapped, so that a test moves the clock of running processes by writing the file. The monotonic
 * clock goes on as it is, as on a machine whose time is set.
 *
 * Waits until a time of day are shifted back, since the kernel's clock did not jump. A wait that is
 * under way when the clock jumps ends when it would have; a real kernel looks again at once.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
/* Seconds since boot stay below, the time of day is above. */
#define TIME_OF_DAY 1000000000LL

static const volatile int64_t *shift_ns;

__attribute__((constructor)) static void map_shift(void)
{
    const char *path = getenv("FEDPHD_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *mapped = mmap(NULL, sizeof *shift_ns, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED)
        shift_ns = mapped;
}

static void add(struct timespec *at, int64_t by_ns)
{
    int64_t ns = at->tv_sec * SECOND + at->tv_nsec + by_ns;
    at->tv_sec = ns / SECOND;
    at->tv_nsec = ns % SECOND;
}

/* The moment of the kernel's clock that a program means by `at`. */
static const struct timespec *real(const struct timespec *at, struct timespec *copy)
{
    if (!at || !shift_ns || at->tv_sec < TIME_OF_DAY)
        return at;
    *copy = *at;
    add(copy, -*shift_ns);
    return copy;
}

int clock_gettime(clockid_t id, struct timespec *now)
{
    static int (*next)(clockid_t, struct timespec *);
    if (!next)
        next = dlsym(RTLD_NEXT, "clock_gettime");
    int code = next(id, now);
    if (code == 0 && shift_ns && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        add(now, *shift_ns);
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec at;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &at))
        return -1;
    now->tv_sec = at.tv_sec;
    now->tv_usec = at.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out)
{
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (out)
        *out = at.tv_sec;
    return at.tv_sec;
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until)
{
    static int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    struct timespec copy;
    if (!next)
        next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    return next(cond, mutex, real(until, &copy));
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until)
{
    static int (*next)(sem_t *, const struct timespec *);
    struct timespec copy;
    if (!next)
        next = dlsym(RTLD_NEXT, "sem_timedwait");
    return next(semaphore, real(until, &copy));
}

long syscall(long number, ...)
{
    static long (*next)(long, ...);
    struct timespec copy;
    long a[6];
    va_list list;
    if (!next)
        next = dlsym(RTLD_NEXT, "syscall");
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_futex && (a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET)
        a[3] = (long)real((const struct timespec *)a[3], &copy);
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
