// SPDX-License-Identifier: MIT
/*
 * The queue loop of core/queue.ts and shim/ring.zig in C over liburing, as the yardstick of
 * bench/ring.ts: no driver, FETCH and COMMIT are NOPs. What the kernel is asked is the same: ring
 * flags and sizes, a registered ring, one enter for each batch, the wake-up read pending beside it.
 * So is what each SQE holds: a NOP carries the io command that a driver would be given.
 *
 *   loop DEPTH    reads seconds from stdin, serves as long, prints requests, seconds, CPU seconds
 */
#include <errno.h>
#include <liburing.h>
#include <linux/ublk_cmd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <time.h>

#define READ UBLK_IO_OP_READ
#define WRITE UBLK_IO_OP_WRITE
#define WAKE 0xffff
#define IO_BYTES (512 * 1024)

enum state { FREE, FETCHED, SERVING };

static struct io_uring ring;
static volatile struct ublksrv_io_desc *descs;
static unsigned char *states;
static __u64 *addresses;
static struct {
    __u64 requests, bytes, errors;
} stats[32];

static void die(const char *what, int error) {
    fprintf(stderr, "loop: %s: %s\n", what, strerror(error));
    exit(1);
}

static double seconds_of(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

/* The time is over: reports, and waits for the next order. */
static void report(int timer) {
    static double since, cpu_since;
    static __u64 served;
    double now = seconds_of(CLOCK_MONOTONIC), seconds;
    if (since > 0) {
        printf("%llu %.9f %.9f\n", stats[READ].requests - served, now - since,
               seconds_of(CLOCK_PROCESS_CPUTIME_ID) - cpu_since);
        fflush(stdout);
    }
    if (scanf("%lf", &seconds) != 1) exit(0);
    struct itimerspec end = {.it_value.tv_sec = seconds};
    end.it_value.tv_nsec = (seconds - end.it_value.tv_sec) * 1e9;
    if (timerfd_settime(timer, 0, &end, NULL) < 0) die("cannot set a timer", errno);
    served = stats[READ].requests;
    cpu_since = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
    since = seconds_of(CLOCK_MONOTONIC);
}

static struct io_uring_sqe *next_sqe(void) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
    if (!sqe) die("a full ring", EBUSY);
    return sqe;
}

static void command(unsigned tag, int result) {
    struct io_uring_sqe *sqe = next_sqe();
    io_uring_prep_nop(sqe);
    struct ublksrv_io_cmd *cmd = (void *)sqe->cmd;
    *cmd = (struct ublksrv_io_cmd){.tag = tag, .result = result, .addr = addresses[tag]};
    io_uring_sqe_set_data64(sqe, tag);
}

/* What core/queue.ts reads from an eventfd is here the timer's. */
static void await_wake(int timer) {
    static __u64 wake_count;
    struct io_uring_sqe *sqe = next_sqe();
    io_uring_prep_read(sqe, timer, &wake_count, sizeof(wake_count), 0);
    io_uring_sqe_set_data64(sqe, WAKE);
}

static void commit(unsigned tag, int result) {
    unsigned op = descs[tag].op_flags & 0xff;
    if (states[tag] != SERVING) die("a commit without a request", EINVAL);
    states[tag] = FETCHED;
    if ((op == READ || op == WRITE) && (result == 0 || (__u32)result > descs[tag].nr_sectors << 9))
        result = -EIO;
    if (result == -EAGAIN) result = -EIO;
    stats[op & 31].requests++;
    if (result >= 0) stats[op & 31].bytes += result;
    else stats[op & 31].errors++;
    command(tag, result);
}

static void handle(unsigned tag) {
    unsigned op = descs[tag].op_flags & 0xff;
    commit(tag, op == READ || op == WRITE ? (int)(descs[tag].nr_sectors << 9) : 0);
}

static unsigned power_of_two(unsigned value) {
    unsigned power = 1;
    while (power < value) power *= 2;
    return power;
}

static void set_up(unsigned depth) {
    const unsigned variants[] = {
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        0,
    };
    int result = -EINVAL;
    for (unsigned i = 0; i < 3 && result == -EINVAL; i++) {
        struct io_uring_params params = {.flags = variants[i]};
        result = io_uring_queue_init_params(power_of_two(depth + 1), &ring, &params);
    }
    if (result < 0) die("cannot set up a ring", -result);
    io_uring_register_ring_fd(&ring);
    descs = mmap(NULL, depth * sizeof(*descs), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    states = calloc(depth, sizeof(*states));
    addresses = calloc(depth, sizeof(*addresses));
    char *buffers = mmap(NULL, (size_t)depth * IO_BYTES, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (descs == MAP_FAILED || buffers == MAP_FAILED || !states || !addresses)
        die("cannot map memory", ENOMEM);
    for (unsigned tag = 0; tag < depth; tag++)
        addresses[tag] = (__u64)buffers + (__u64)tag * IO_BYTES;
}

int main(int argc, char **argv) {
    unsigned depth = argc > 1 ? atoi(argv[1]) : 0;
    if (depth < 1 || depth > 4096) die("usage: loop DEPTH", EINVAL);
    set_up(depth);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    if (timer < 0) die("cannot make a timer", errno);
    for (unsigned tag = 0; tag < depth; tag++) {
        descs[tag].op_flags = READ;
        descs[tag].nr_sectors = 8;
        descs[tag].start_sector = 8 * tag;
        states[tag] = FETCHED;
        command(tag, 0);
    }
    await_wake(timer);
    report(timer);
    for (;;) {
        int result = io_uring_submit_and_wait(&ring, 1);
        if (result < 0 && result != -EINTR) die("cannot enter the ring", -result);
        struct io_uring_cqe *cqe;
        unsigned head, count = 0;
        io_uring_for_each_cqe(&ring, head, cqe) {
            unsigned tag = cqe->user_data;
            count++;
            if (tag == WAKE) {
                report(timer);
                await_wake(timer);
                continue;
            }
            if (states[tag] != FETCHED || cqe->res != 0) die("a request out of turn", EINVAL);
            states[tag] = SERVING;
            handle(tag);
        }
        io_uring_cq_advance(&ring, count);
    }
}
