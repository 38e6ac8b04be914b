using System.Diagnostics;
using System.Runtime.InteropServices;

namespace Rollout.Native;

/// <summary>
/// One rank of a group of processes that exchange bytes between their devices. When a rank dies the others' work never finishes, so every
/// wait here has a deadline, and ends by aborting.
/// </summary>
internal sealed class NcclCommunicator : CudaHandle
{
    private static readonly TimeSpan s_spins = TimeSpan.FromMilliseconds(20);

    private readonly CudaEvent _done; // recorded after its work, to wait for it

    /// <summary>Waits until all ranks have joined.</summary>
    /// <param name="context">Of the device.</param>
    /// <param name="id">Of <see cref="NewId"/>, the same for all ranks.</param>
    /// <param name="ranks">How many there are.</param>
    /// <param name="rank">Which of them this is.</param>
    /// <param name="deadline">From now.</param>
    /// <param name="cancellation">Ends the wait.</param>
    /// <exception cref="CudaException">The library is missing, or NCCL refused.</exception>
    /// <exception cref="TimeoutException">A rank has not joined.</exception>
    public NcclCommunicator(
        CudaContext context, ncclUniqueId id, int ranks, int rank, TimeSpan deadline, CancellationToken cancellation = default)
        : base(context)
    {
        Require();
        _done = new CudaEvent(context);
        long start = Stopwatch.GetTimestamp();
        string asked = $"rank {rank} of {ranks}";
        nint communicator = 0; // a failure may leave it unchanged
        ncclResult result = Nccl.ncclCommInitRankConfig(ref communicator, ranks, id, rank, ncclConfig.NonBlocking);
        if (communicator != 0)
            Own(communicator); // there may be one after a failure too
        OrEnd(() =>
        {
            if (result != ncclResult.ncclInProgress)
                result.ThrowIfFailed(asked, nameof(Nccl.ncclCommInitRankConfig));
        });
        WaitUntilIdle(asked, start, deadline, $"NCCL: not all of {ranks} ranks joined", cancellation);
    }

    /// <summary>The id of a new group. The process that created it has to run until all ranks have joined.</summary>
    public static ncclUniqueId NewId()
    {
        Require();
        Nccl.ncclGetUniqueId(out ncclUniqueId id).ThrowIfFailed();
        return id;
    }

    /// <summary>Queues a copy of the root's bytes to all ranks. Every rank must queue the same broadcasts in the same order.</summary>
    /// <param name="source">On the root's device; ignored by other ranks.</param>
    /// <param name="destination">On this device.</param>
    /// <param name="bytes">As many on all ranks.</param>
    /// <param name="root">The rank that has them.</param>
    /// <param name="stream">Of this device.</param>
    /// <param name="deadline">From now, for the queueing alone.</param>
    public void Broadcast(nuint source, nuint destination, long bytes, int root, CudaStream stream, TimeSpan deadline)
    {
        string asked = $"{bytes} bytes from rank {root}";
        long start = Stopwatch.GetTimestamp();
        ncclResult result = Nccl.ncclBroadcast(source, destination, (nuint)bytes, ncclDataType.ncclUint8, root, Value, stream.Value);
        if (result != ncclResult.ncclInProgress)
            result.ThrowIfFailed(asked, nameof(Nccl.ncclBroadcast));
        WaitUntilIdle(asked, start, deadline, $"NCCL could not queue {asked}", default);
    }

    /// <summary>
    /// Waits until the work queued on a stream is done. On failure the communicator is aborted, and the bytes that arrived must not be
    /// used.
    /// </summary>
    /// <param name="stream">Of this device.</param>
    /// <param name="deadline">From now.</param>
    /// <param name="cancellation">Ends the wait, and the communicator.</param>
    /// <exception cref="CudaException">A rank died, or queued something else.</exception>
    /// <exception cref="TimeoutException">The deadline has passed.</exception>
    public void Synchronize(CudaStream stream, TimeSpan deadline, CancellationToken cancellation = default)
    {
        long start = Stopwatch.GetTimestamp();
        OrEnd(() =>
        {
            _done.Record(stream);
            while (!_done.IsReached)
            {
                _ = IsIdle("a broadcast in flight");
                Wait(start, deadline, "NCCL: a broadcast did not finish", cancellation);
            }
        });
    }

    /// <summary>
    /// Ends it without notifying the other ranks: a receiver has nothing to tell them, and the sender learns in another way that all have
    /// received.
    /// </summary>
    protected override CUresult Destroy(nint value) =>
        Nccl.ncclCommAbort(value) == ncclResult.ncclSuccess ? CUresult.CUDA_SUCCESS : CUresult.CUDA_ERROR_INVALID_VALUE;

    protected override void Dispose(bool disposing)
    {
        base.Dispose(disposing);
        if (disposing)
            _done.Dispose();
    }

    private static void Require()
    {
        if (CudaLibraries.Missing(CudaLibraries.Nccl) is { } missing)
            throw new CudaException(missing);
    }

    private void WaitUntilIdle(string asked, long start, TimeSpan deadline, string what, CancellationToken cancellation)
        => OrEnd(() =>
        {
            while (!IsIdle(asked))
                Wait(start, deadline, what, cancellation);
        });

    /// <summary>On failure aborts the communicator, so that nothing waits in it any more.</summary>
    private void OrEnd(Action wait)
    {
        try
        {
            wait();
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <summary>Between two questions. A sleep takes a millisecond at best, longer than a bucket takes between two GPUs.</summary>
    private static void Wait(long start, TimeSpan deadline, string what, CancellationToken cancellation)
    {
        cancellation.ThrowIfCancellationRequested();
        TimeSpan waited = Stopwatch.GetElapsedTime(start);
        if (waited > deadline)
            throw new TimeoutException($"{what} within {deadline.TotalSeconds:0.###} s.");
        if (waited < s_spins)
            Thread.SpinWait(100);
        else
            Thread.Sleep(1);
    }

    /// <summary>Whether the last call is done; throws when it failed on this or another rank.</summary>
    private bool IsIdle(string asked)
    {
        Nccl.ncclCommGetAsyncError(Value, out ncclResult error).ThrowIfFailed(asked);
        if (error != ncclResult.ncclInProgress)
            error.ThrowIfFailed(asked, "NCCL");
        return error == ncclResult.ncclSuccess;
    }
}
