/*
 * blkcheck - writes blocks that tell where and when they were written, and checks them.
 *
 *   blkcheck write  FILE --count N [--start A] [options]   operations A … A+N-1
 *   blkcheck write  FILE --seconds T [options]             as many operations as fit; prints how many
 *   blkcheck verify FILE --flushed N [--written M] [options]
 *
 * Options (the same for write and verify):
 *   --size BYTES    use that much of FILE (default: all of it; a regular file is made that long)
 *   --offset BYTES  begin there, so that several at once can share a device
 *   --bs BYTES      block size, a multiple of 512 (default 4096)
 *   --seed S        a different seed is a different pattern (default 1)
 *   --fsync-every K an fsync after every K operations and at the end (default 64)
 *   --direct        O_DIRECT: past the guest's page cache
 *   --progress      a line "blkcheck: writing" after the first fsync
 *   --report K      a line "blkcheck: S at N" after every K operations, S being the seed
 *   --until PATH    stop when that file is there; looked at after every fsync
 *
 * Operation i writes block mix(seed, i) % blocks, filled with (seed, block, i) and noise made from them. So verify needs
 * no record of what was written: after operations 0 … N-1 were flushed, and any of those up to M-1 may have
 * arrived, each block must hold, whole, an operation meant for it, not older than its last one before N.
 * A block that no operation before N names may also be anything else of old (it is not looked at).
 *
 * Exit code: 0 done, 1 wrong data or I/O error, 2 usage. The last line says how long the longest operation stalled.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <linux/fs.h>

#define MAGIC UINT64_C(0x4b43484342504853)
#define NEVER UINT64_MAX

struct header {
    uint64_t magic, seed, block, operation;
};

struct job {
    const char *file;
    const char *until;
    uint64_t size, offset, bs, seed, fsync_every, report, start, count, flushed, written, seconds;
    int direct, progress;
    int fd;
    uint64_t blocks;
    uint64_t *buf;
};

static void fail(const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    fprintf(stdout, "blkcheck: ");
    vfprintf(stdout, format, ap);
    fprintf(stdout, "\n");
    va_end(ap);
    exit(1);
}

static void usage(void)
{
    fprintf(stderr,
        "usage: blkcheck write FILE (--count N [--start A] | --seconds T) [options]\n"
        "       blkcheck verify FILE --flushed N [--written M] [options]\n"
        "options: --size BYTES --offset BYTES --bs BYTES --seed S --fsync-every K --direct --progress --report K --until PATH\n");
    exit(2);
}

/* splitmix64: every input bit changes half of the output bits. */
static uint64_t mix(uint64_t a, uint64_t b)
{
    uint64_t z = a * UINT64_C(0x9e3779b97f4a7c15) + b + UINT64_C(0x632be59bd9b4e019);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static uint64_t block_of(const struct job *j, uint64_t operation)
{
    return mix(j->seed, operation) % j->blocks;
}

/* The word at position i of what an operation writes into a block, i behind the header. */
static uint64_t noise(uint64_t key, uint64_t i)
{
    return (key ^ (i * UINT64_C(0x9e3779b97f4a7c15))) * UINT64_C(0xd1342543de82ef95);
}

static void fill(const struct job *j, uint64_t operation, uint64_t block)
{
    struct header h = {MAGIC, j->seed, block, operation};
    uint64_t key = mix(mix(j->seed, block), operation);
    memcpy(j->buf, &h, sizeof h);
    for (uint64_t i = sizeof h / 8; i < j->bs / 8; i++)
        j->buf[i] = noise(key, i);
}

/* The operation whose data fills the buffer whole, or NEVER. */
static uint64_t recognise(const struct job *j, uint64_t block)
{
    struct header h;
    memcpy(&h, j->buf, sizeof h);
    if (h.magic != MAGIC || h.seed != j->seed || h.block != block)
        return NEVER;
    uint64_t key = mix(mix(j->seed, block), h.operation);
    for (uint64_t i = sizeof h / 8; i < j->bs / 8; i++)
        if (j->buf[i] != noise(key, i))
            return NEVER;
    return h.operation;
}

static void open_file(struct job *j, int writing)
{
    struct stat st;
    int flags = (writing ? O_RDWR | O_CREAT : O_RDONLY) | (j->direct ? O_DIRECT : 0);
    j->fd = open(j->file, flags, 0644);
    if (j->fd < 0 || fstat(j->fd, &st) != 0)
        fail("%s: %s", j->file, strerror(errno));
    uint64_t there = st.st_size;
    if (S_ISBLK(st.st_mode) && ioctl(j->fd, BLKGETSIZE64, &there) != 0)
        fail("%s: size: %s", j->file, strerror(errno));
    if (j->size == 0)
        j->size = there > j->offset ? there - j->offset : 0;
    if (there < j->offset + j->size) {
        if (!writing || S_ISBLK(st.st_mode) || ftruncate(j->fd, j->offset + j->size) != 0)
            fail("%s has %" PRIu64 " bytes, not %" PRIu64, j->file, there, j->offset + j->size);
    }
    j->blocks = j->size / j->bs;
    if (j->blocks == 0)
        fail("%s: not even one block of %" PRIu64 " bytes", j->file, j->bs);
    void *memory;
    if (posix_memalign(&memory, 4096, j->bs) != 0)
        fail("out of memory");
    j->buf = memory;
}

static int write_all(struct job *j)
{
    double begin = now(), longest = 0, longest_at = 0;
    uint64_t done = 0;
    int told = 0;
    while (j->seconds ? now() - begin < j->seconds : done < j->count) {
        uint64_t operation = j->start + done, block = block_of(j, operation);
        fill(j, operation, block);
        double t = now();
        ssize_t n = pwrite(j->fd, j->buf, j->bs, j->offset + block * j->bs);
        if (n != (ssize_t)j->bs)
            fail("write of block %" PRIu64 " (operation %" PRIu64 "): %s", block, operation,
                n < 0 ? strerror(errno) : "short");
        done++;
        int synced = done % j->fsync_every == 0;
        if (synced && fsync(j->fd) != 0)
            fail("fsync after operation %" PRIu64 ": %s", operation, strerror(errno));
        double took = now() - t;
        if (took > longest) {
            longest = took;
            longest_at = t - begin;
        }
        if (synced && j->progress && !told) {
            printf("blkcheck: writing\n");
            fflush(stdout);
            told = 1;
        }
        if (j->report && done % j->report == 0) {
            /* One write, so that lines of several at once do not mix. */
            char line[80];
            int length = snprintf(line, sizeof line, "blkcheck: %" PRIu64 " at %" PRIu64 "\n", j->seed, done);
            if (write(STDOUT_FILENO, line, length) != length)
                fail("stdout: %s", strerror(errno));
        }
        if (synced && j->until && access(j->until, F_OK) == 0)
            break;
    }
    if (fsync(j->fd) != 0)
        fail("last fsync: %s", strerror(errno));
    printf("blkcheck: wrote %" PRIu64 " operations from %" PRIu64 " in %.1f s; longest stall %.0f ms at %.1f s\n", done,
        j->start, now() - begin, longest * 1e3, longest_at);
    return 0;
}

static int verify_all(struct job *j)
{
    /* last[b]: one more than the number of the last flushed operation on block b; 0: none. */
    uint64_t *last = calloc(j->blocks, sizeof *last);
    if (!last)
        fail("out of memory");
    for (uint64_t i = 0; i < j->flushed; i++)
        last[block_of(j, i)] = i + 1;
    uint64_t wrong = 0, checked = 0;
    double longest = 0;
    for (uint64_t b = 0; b < j->blocks; b++) {
        if (!last[b])
            continue;
        double t = now();
        ssize_t n = pread(j->fd, j->buf, j->bs, j->offset + b * j->bs);
        if (n != (ssize_t)j->bs)
            fail("read of block %" PRIu64 ": %s", b, n < 0 ? strerror(errno) : "short");
        double took = now() - t;
        longest = took > longest ? took : longest;
        checked++;
        uint64_t found = recognise(j, b);
        if (found != NEVER && found + 1 >= last[b] && found < j->written && block_of(j, found) == b)
            continue;
        if (++wrong > 10)
            continue;
        struct header h;
        memcpy(&h, j->buf, sizeof h);
        printf("blkcheck: wrong: block %" PRIu64 " must hold operation %" PRIu64 " or newer below %" PRIu64 ", %s %" PRIu64
               " (first word %016" PRIx64 ")\n",
            b, last[b] - 1, j->written, found == NEVER ? "is torn or foreign, header names" : "holds", h.operation, h.magic);
    }
    printf("blkcheck: checked %" PRIu64 " blocks, %" PRIu64 " wrong; longest stall %.0f ms\n", checked, wrong, longest * 1e3);
    if (checked == 0)
        fail("nothing was checked");
    return wrong ? 1 : 0;
}

int main(int argc, char **argv)
{
    struct job j = {.bs = 4096, .seed = 1, .fsync_every = 64};
    if (argc < 3)
        usage();
    int writing = strcmp(argv[1], "write") == 0;
    if (!writing && strcmp(argv[1], "verify") != 0)
        usage();
    j.file = argv[2];
    struct {
        const char *name;
        uint64_t *value;
    } numbers[] = {
        {"--size", &j.size}, {"--offset", &j.offset}, {"--report", &j.report}, {"--bs", &j.bs}, {"--seed", &j.seed}, {"--fsync-every", &j.fsync_every},
        {"--start", &j.start}, {"--count", &j.count}, {"--seconds", &j.seconds},
        {"--flushed", &j.flushed}, {"--written", &j.written},
    };
    for (int i = 3; i < argc; i++) {
        size_t k, known = sizeof numbers / sizeof *numbers;
        if (strcmp(argv[i], "--direct") == 0) {
            j.direct = 1;
            continue;
        }
        if (strcmp(argv[i], "--until") == 0 && i + 1 < argc) {
            j.until = argv[++i];
            continue;
        }
        if (strcmp(argv[i], "--progress") == 0) {
            j.progress = 1;
            continue;
        }
        for (k = 0; k < known && strcmp(argv[i], numbers[k].name) != 0; k++)
            ;
        char *end;
        if (k == known || i + 1 == argc)
            usage();
        *numbers[k].value = strtoull(argv[++i], &end, 10);
        if (*end || end == argv[i])
            usage();
    }
    if (j.bs < 512 || j.bs % 512 || j.fsync_every == 0)
        usage();
    if (writing ? !j.count == !j.seconds : !j.flushed)
        usage();
    if (j.written < j.flushed)
        j.written = j.flushed;
    open_file(&j, writing);
    return writing ? write_all(&j) : verify_all(&j);
}
