// NCCL between processes, over sockets of this machine. The process that creates an id listens until all ranks have joined, and sends them
// each other's ports; then there is a connection between every two. As with the real library, calls that queue on a stream return at once,
// and when a rank has died the others' work does not end: they have to query the error, and to abort.
#include "sim.h"
#include <arpa/inet.h>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <future>
#include <poll.h>
#include <random>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>
#include <vector>

extern "C" {
struct ncclUniqueId { char internal[128]; };
struct ncclConfig { size_t size; unsigned magic, version; int blocking; };
}

namespace
{
enum { Success = 0, SystemError = 2, InternalError = 3, InvalidArgument = 4, InvalidUsage = 5, RemoteError = 6, InProgress = 7 };
constexpr int SizeOf[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2}; // by ncclDataType_t
constexpr unsigned Magic = 0xcafebeef;
constexpr int MostRanks = 1024; // more are refused after the communicator is created, like a failure in the middle
std::atomic<int> s_communicators;

struct Id { char magic[8]; uint64_t secret; uint16_t port; };
static_assert(sizeof(Id) <= sizeof(ncclUniqueId), "fits");

struct Hello { uint64_t secret; int32_t ranks, rank, port; };
struct Header { uint64_t number, bytes, root; };

struct Comm
{
    int ranks, rank;
    std::vector<int> peers;
    std::atomic<bool> aborted{false};
    std::atomic<int> state{InProgress};
    std::thread connecting;
    std::shared_future<void> last; // the last queued work
    uint64_t queued = 0;

    int fail(int error)
    {
        int busy = InProgress, well = Success;
        if (!state.compare_exchange_strong(well, error))
            state.compare_exchange_strong(busy, error);
        return error;
    }
};

sockaddr_in here(uint16_t port)
{
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

int listen_here(uint16_t* port)
{
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address = here(0);
    socklen_t length = sizeof address;
    if (listener < 0 || bind(listener, (sockaddr*)&address, sizeof address) != 0 || listen(listener, SOMAXCONN) != 0
        || getsockname(listener, (sockaddr*)&address, &length) != 0)
        return -1;
    *port = ntohs(address.sin_port);
    return listener;
}

// Waits until there is something to move, or the end was requested.
bool ready(int socket, short what, const std::atomic<bool>* aborted)
{
    for (;;)
    {
        if (aborted != nullptr && *aborted)
            return false;
        pollfd p = {socket, what, 0};
        int n = poll(&p, 1, 10);
        if (n > 0)
            return true;
        if (n < 0 && errno != EINTR)
            return false;
    }
}

// move(p, bytes) receives or sends what it can, and returns the number of bytes; it is called with none only at the end.
template <class Move> bool move_all(int socket, short what, char* p, size_t bytes, const std::atomic<bool>* aborted, Move move)
{
    while (bytes > 0)
    {
        if (!ready(socket, what, aborted))
            return false;
        ssize_t n = move(p, bytes);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
            return false;
        if (n > 0)
        {
            p += n;
            bytes -= (size_t)n;
        }
    }

    return true;
}

bool read_all(int socket, void* to, size_t bytes, const std::atomic<bool>* aborted)
{
    return move_all(socket, POLLIN, (char*)to, bytes, aborted, [=](char* p, size_t left) { return recv(socket, p, left, MSG_DONTWAIT); });
}

bool write_all(int socket, const void* from, size_t bytes, const std::atomic<bool>* aborted)
{
    return move_all(socket, POLLOUT, (char*)from, bytes, aborted, [=](char* p, size_t left) { return send(socket, p, left, MSG_DONTWAIT | MSG_NOSIGNAL); });
}

int connect_to(uint16_t port)
{
    int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address = here(port);
    if (s >= 0 && connect(s, (sockaddr*)&address, sizeof address) == 0)
        return s;
    close(s);
    return -1;
}

// Sends all ranks the ports of the others, once the last has joined.
void introduce(int listener, uint64_t secret)
{
    std::vector<int> sockets;
    std::vector<int32_t> ports;
    size_t come = 0;
    do
    {
        int s = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        Hello hello;
        if (s < 0 || !read_all(s, &hello, sizeof hello, nullptr) || hello.secret != secret || hello.ranks < 1 || hello.rank < 0
            || hello.rank >= hello.ranks || (!sockets.empty() && (int)sockets.size() != hello.ranks))
        {
            close(s);
            continue;
        }

        sockets.resize((size_t)hello.ranks, -1);
        ports.resize((size_t)hello.ranks);
        if (sockets[(size_t)hello.rank] >= 0)
        {
            close(s); // this rank is here
            continue;
        }

        sockets[(size_t)hello.rank] = s;
        ports[(size_t)hello.rank] = hello.port;
        come++;
    } while (come == 0 || come < sockets.size());

    for (int s : sockets)
    {
        write_all(s, ports.data(), ports.size() * sizeof ports[0], nullptr);
        close(s);
    }

    close(listener);
}

int connect_all(Comm* comm, const Id& id)
{
    uint16_t port;
    int listener = listen_here(&port), root = connect_to(id.port);
    if (listener < 0 || root < 0)
        return SystemError;
    Hello hello = {id.secret, comm->ranks, comm->rank, port};
    std::vector<int32_t> ports((size_t)comm->ranks);
    bool met = write_all(root, &hello, sizeof hello, &comm->aborted) && read_all(root, ports.data(), ports.size() * sizeof ports[0], &comm->aborted);
    close(root);
    for (int rank = 0; met && rank < comm->rank; rank++)
    {
        int s = connect_to((uint16_t)ports[(size_t)rank]);
        met = s >= 0 && write_all(s, &hello, sizeof hello, &comm->aborted);
        comm->peers[(size_t)rank] = s;
    }

    for (int left = comm->ranks - 1 - comm->rank; met && left > 0;)
    {
        Hello peer;
        met = ready(listener, POLLIN, &comm->aborted);
        int s = met ? accept4(listener, nullptr, nullptr, SOCK_CLOEXEC) : -1;
        if (!met || s < 0)
            continue;
        if (read_all(s, &peer, sizeof peer, &comm->aborted) && peer.secret == id.secret && peer.rank > comm->rank && peer.rank < comm->ranks)
        {
            comm->peers[(size_t)peer.rank] = s;
            left--;
        }
        else
            close(s);
    }

    close(listener);
    return met ? Success : RemoteError;
}

// The device's part. Does not end by itself when a rank has died.
void broadcast(Comm* comm, const void* source, void* destination, Header what)
{
    int error = Success;
    if (comm->rank == (int)what.root)
    {
        if (source != destination)
            memmove(destination, source, what.bytes);
        for (int rank = 0; rank < comm->ranks && error == Success; rank++)
        {
            int s = comm->peers[(size_t)rank];
            if (rank != (int)what.root && (!write_all(s, &what, sizeof what, &comm->aborted) || !write_all(s, source, what.bytes, &comm->aborted)))
                error = RemoteError;
        }
    }
    else
    {
        int s = comm->peers[what.root];
        Header sent;
        if (!read_all(s, &sent, sizeof sent, &comm->aborted))
            error = RemoteError;
        else if (memcmp(&sent, &what, sizeof what) != 0)
            error = InvalidUsage; // the ranks queued different operations
        else if (!read_all(s, destination, what.bytes, &comm->aborted))
            error = RemoteError;
    }

    if (error == Success)
        return;
    comm->fail(error);
    while (!comm->aborted)
        usleep(1000);
}
}

extern "C" {
// The number of this process's communicators that were created and not aborted.
int cuSimCommunicators() { return s_communicators; }

const char* ncclGetErrorString(int error)
{
    switch (error)
    {
        case Success: return "no error";
        case SystemError: return "unhandled system error";
        case InvalidArgument: return "invalid argument";
        case InvalidUsage: return "invalid usage";
        case RemoteError: return "remote process exited or there was a network error";
        case InProgress: return "NCCL operation in progress";
        default: return "internal error";
    }
}

int ncclGetUniqueId(ncclUniqueId* out)
{
    std::random_device random;
    Id id = {"sim", (uint64_t)random() << 32 | random(), 0};
    int listener = listen_here(&id.port);
    if (listener < 0)
        return SystemError;
    memset(out, 0, sizeof *out);
    memcpy(out, &id, sizeof id);
    std::thread(introduce, listener, id.secret).detach();
    return Success;
}

int ncclCommInitRankConfig(void** out, int ranks, ncclUniqueId unique, int rank, const ncclConfig* config)
{
    Id id;
    memcpy(&id, &unique, sizeof id);
    if (config == nullptr || config->magic != Magic || config->size < sizeof *config || ranks < 1 || rank < 0 || rank >= ranks || strcmp(id.magic, "sim") != 0)
        return InvalidArgument;
    Comm* comm = new Comm();
    s_communicators++;
    comm->ranks = ranks;
    comm->rank = rank;
    comm->peers.assign((size_t)ranks, -1);
    std::promise<void> none;
    none.set_value();
    comm->last = none.get_future().share();
    *out = comm;
    if (ranks > MostRanks)
        return comm->fail(InternalError);
    comm->connecting = std::thread([comm, id]
    {
        int result = connect_all(comm, id), busy = InProgress;
        comm->state.compare_exchange_strong(busy, result);
    });
    if (config->blocking == 0)
        return InProgress;
    comm->connecting.join();
    return comm->state;
}

int ncclCommGetAsyncError(void* communicator, int* error)
{
    *error = ((Comm*)communicator)->state;
    return Success;
}

int ncclBroadcast(const void* source, void* destination, size_t count, int type, int root, void* communicator, void* stream)
{
    Comm* comm = (Comm*)communicator;
    if (comm->state != Success)
        return comm->state == InProgress ? (int)InvalidUsage : (int)comm->state;
    if (type < 0 || (size_t)type >= sizeof SizeOf / sizeof SizeOf[0] || root < 0 || root >= comm->ranks)
        return InvalidArgument;
    size_t bytes = count * (size_t)SizeOf[type];
    if (!sim::is_device_memory(destination, bytes) || (comm->rank == root && !sim::is_device_memory(source, bytes)))
        return InvalidArgument;
    Header what = {comm->queued++, bytes, (uint64_t)root};
    std::shared_future<void> before = comm->last;
    return sim::submit_beside(stream, &comm->last, [=]
    {
        before.wait();
        broadcast(comm, source, destination, what);
    }) ? Success : InvalidUsage;
}

int ncclCommAbort(void* communicator)
{
    Comm* comm = (Comm*)communicator;
    comm->aborted = true;
    if (comm->connecting.joinable())
        comm->connecting.join();
    comm->last.wait();
    for (int peer : comm->peers)
    {
        if (peer >= 0)
            close(peer);
    }

    delete comm;
    s_communicators--;
    return Success;
}
}
