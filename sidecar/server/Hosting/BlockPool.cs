using System.Buffers;
using Microsoft.AspNetCore.Connections;

namespace Rollout.Server.Hosting;

/// <summary>
/// The memory in which Kestrel keeps received bytes until a request has read them. Kestrel's own pool has blocks of 4 KiB, and each block
/// costs one system call and two thread switches: for a payload of gigabytes, most of the work.
/// </summary>
internal sealed class BlockPool : MemoryPool<byte>, IMemoryPoolFactory<byte>
{
    /// <summary>Sizes from 64 KiB to 256 KiB showed no measurable difference.</summary>
    public const int BlockBytes = 128 << 10;

    /// <summary>
    /// Most blocks of this size at once: 64 MiB. Further blocks are small, because thousands of streams that hold a few bytes each do not
    /// carry a payload.
    /// </summary>
    public const int MaxBlocks = 512;

    private readonly Lock _lock = new();
    private readonly Stack<Block> _free = []; // a stack, because the block used last is still in the CPU's cache
    private int _rented;

    public override int MaxBufferSize => BlockBytes;

    /// <summary>One pool for all of Kestrel's queues, so that the limit holds for the process.</summary>
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

    /// <summary>Called by each queue that got the pool; the others may still use it, so nothing is freed.</summary>
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
        // Pinned, because the kernel writes to it.
        public Memory<byte> Memory { get; } = GC.AllocateUninitializedArray<byte>(BlockBytes, pinned: true);

        public void Dispose() => pool.Return(this);
    }
}
