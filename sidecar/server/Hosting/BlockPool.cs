using System.Buffers;
using Microsoft.AspNetCore.Connections;

namespace Rollout.Server.Hosting;

/// <summary>
/// The memory Kestrel keeps in what comes over its connections until a request has read it. Its own pool has blocks of 4 KiB, and a block
/// is one system call and two changes of thread on the way there: for a payload of gigabytes, most of the work.
/// </summary>
internal sealed class BlockPool : MemoryPool<byte>, IMemoryPoolFactory<byte>
{
    /// <summary>Between 64 KiB and 256 KiB there was no difference outside the noise.</summary>
    public const int BlockBytes = 128 << 10;

    /// <summary>
    /// Of this size at once, 64 MiB. Past them blocks are small: thousands of streams that hold a few bytes each are no payload.
    /// </summary>
    public const int MaxBlocks = 512;

    private readonly Lock _lock = new();
    private readonly Stack<Block> _free = []; // the last one used is the one still in the cache
    private int _rented;

    public override int MaxBufferSize => BlockBytes;

    /// <summary>One for all of Kestrel's queues, so that the limit is the process's.</summary>
    public MemoryPool<byte> Create(MemoryPoolOptions? options = null) => this;

    public override IMemoryOwner<byte> Rent(int minBufferSize = -1)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(minBufferSize, BlockBytes);
        lock (_lock)
        {
            if (_rented < MaxBlocks)
            {
                _rented++;
                return _free.TryPop(out Block? block) ? block : new Block(this);
            }
        }

        return Shared.Rent(minBufferSize);
    }

    /// <summary>By each of those it was given to: the others may still use it.</summary>
    protected override void Dispose(bool disposing)
    {
    }

    private void Return(Block block)
    {
        lock (_lock)
        {
            _rented--;
            _free.Push(block);
        }
    }

    private sealed class Block(BlockPool pool) : IMemoryOwner<byte>
    {
        // Pinned, since the kernel writes into it.
        public Memory<byte> Memory { get; } = GC.AllocateUninitializedArray<byte>(BlockBytes, pinned: true);

        public void Dispose() => pool.Return(this);
    }
}
