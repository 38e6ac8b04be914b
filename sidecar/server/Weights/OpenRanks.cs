using Google.Protobuf;
using Rollout.Kernels.Cuda;

namespace Rollout.Server.Weights;

/// <summary>
/// The group of NCCL ranks that updates over one connection receive from: joined once, and kept until the client names another, a transfer
/// fails, the client releases it, or the connection ends.
/// </summary>
internal sealed class OpenRanks : IDisposable
{
    private readonly Lock _lock = new();
    private ByteString _id = ByteString.Empty;
    private CudaRanks? _ranks;
    private bool _disposed;

    /// <summary>Of the group that this connection is in; empty: none.</summary>
    public ByteString Id
    {
        get
        {
            lock (_lock) return _ranks is { IsOpen: true } ? _id : ByteString.Empty;
        }
    }

    /// <summary>Joins, unless this connection is in the group of this id already. Blocks until all ranks have joined.</summary>
    /// <inheritdoc cref="CudaPeers.Join"/>
    public CudaRanks Join(CudaPeers peers, ByteString id, int ranks, int rank, CancellationToken cancellation)
    {
        lock (_lock)
        {
            if (_ranks is { IsOpen: true } && _id == id) return _ranks;
            Leave();
        }

        CudaRanks joined = peers.Join(id.Span, ranks, rank, cancellation);
        lock (_lock)
        {
            (_id, _ranks) = (id, joined);
            if (_disposed) Leave(); // the connection has ended meanwhile; whoever uses the group finds it closed
            return joined;
        }
    }

    /// <summary>Leaves the group, if there is one.</summary>
    public void Leave()
    {
        lock (_lock)
        {
            _ranks?.Dispose();
            _ranks = null;
        }
    }

    public void Dispose()
    {
        lock (_lock) _disposed = true;
        Leave();
    }
}
