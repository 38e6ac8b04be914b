using System.Buffers.Binary;
using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// XXH3-128, which System.IO.Hashing calls XxHash128, of tensors in device memory, so that bytes which never were on the host are still
/// checked end to end: see digest.cu. All tensors of a call are processed together, because each of them is one sequential chain.
/// </summary>
internal sealed unsafe class CudaDigest : IDisposable
{
    private const int BlockBytes = 1024;
    private const int SumBytes = 64;      // of a block
    private const int HostBytes = 240;    // XXH3 has another algorithm for tensors up to this size, which is not worth a kernel
    private const int MostTensors = 64;   // at a time
    private const int SumsThreads = 256;
    private const int ChainThreads = 32;
    private const int MostSumsBlocks = 256; // of the grid, per tensor

    private readonly CudaDevice _device;
    private readonly CudaKernels _kernels;
    private readonly Func<byte[], byte[]> _onHost;
    private readonly long _pieceBlocks;
    private readonly DeviceBuffer _pieces, _sums, _states, _digests;

    /// <param name="device">Where the tensors are.</param>
    /// <param name="kernels">Of that device.</param>
    /// <param name="onHost">XxHash128, for tensors of up to 240 bytes.</param>
    /// <param name="pieceBytes">Bytes of a tensor processed at a time; a sixteenth of it is allocated, 64 times.</param>
    public CudaDigest(CudaDevice device, CudaKernels kernels, Func<byte[], byte[]> onHost, int pieceBytes)
    {
        _device = device;
        _kernels = kernels;
        _onHost = onHost;
        _pieceBlocks = pieceBytes / BlockBytes;
        _pieces = device.Allocate(MostTensors * sizeof(Piece));
        _sums = device.Allocate(MostTensors * _pieceBlocks * SumBytes);
        _states = device.Allocate(MostTensors * SumBytes);
        _digests = device.Allocate(MostTensors * sizeof(UInt128));
    }

    /// <summary>As in digest.cu.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct Piece
    {
        public nuint Tensor;
        public ulong Bytes;
        public ulong FirstBlock;
        public uint Blocks;
        public uint Sums;
        public uint State;
        public uint Last;
    }

    /// <summary>
    /// The digests of tensors, 16 bytes each, as XxHash128.Hash returns them. Waits for the result; nothing else may use the device's
    /// second stream meanwhile.
    /// </summary>
    public byte[][] Of(ReadOnlySpan<(nuint Pointer, long Bytes)> tensors)
    {
        byte[][] digests = new byte[tensors.Length][];
        lock (_device.Copies)
        {
            _device.MakeCurrent();
            for (int first = 0; first < tensors.Length; first += MostTensors)
                OfSome(tensors[first..Math.Min(tensors.Length, first + MostTensors)], digests.AsSpan(first));
        }

        return digests;
    }

    public void Dispose()
    {
        _pieces.Dispose();
        _sums.Dispose();
        _states.Dispose();
        _digests.Dispose();
    }

    private void OfSome(ReadOnlySpan<(nuint Pointer, long Bytes)> tensors, Span<byte[]> digests)
    {
        Span<Piece> pieces = stackalloc Piece[MostTensors];
        for (long firstBlock = 0; ; firstBlock += _pieceBlocks)
        {
            int count = 0;
            long most = 0;
            for (int t = 0; t < tensors.Length; t++)
            {
                long whole = (tensors[t].Bytes - 1) / BlockBytes; // the last block is never whole
                if (tensors[t].Bytes <= HostBytes || (firstBlock > 0 && firstBlock >= whole))
                    continue;
                long blocks = Math.Min(_pieceBlocks, whole - firstBlock);
                pieces[count] = new Piece
                {
                    Tensor = tensors[t].Pointer,
                    Bytes = (ulong)tensors[t].Bytes,
                    FirstBlock = (ulong)firstBlock,
                    Blocks = (uint)blocks,
                    Sums = (uint)(count * _pieceBlocks),
                    State = (uint)t,
                    Last = firstBlock + blocks == whole ? 1u : 0u,
                };
                most = Math.Max(most, blocks);
                count++;
            }

            if (count == 0)
                break;
            Queue(pieces[..count], most);
        }

        Span<UInt128> found = stackalloc UInt128[MostTensors];
        _device.Download(_digests.Pointer, MemoryMarshal.AsBytes(found[..tensors.Length]), _device.Beside);
        for (int t = 0; t < tensors.Length; t++)
            digests[t] = tensors[t].Bytes <= HostBytes ? OnHost(tensors[t].Pointer, (int)tensors[t].Bytes) : Canonical(found[t]);
    }

    private void Queue(ReadOnlySpan<Piece> pieces, long mostBlocks)
    {
        fixed (Piece* source = pieces)
        {
            Driver.cuMemcpyHtoDAsync_v2(_pieces.Pointer, source, (nuint)(pieces.Length * sizeof(Piece)), _device.Beside.Value)
                .ThrowIfFailed();
        }

        const int BlocksPerGroup = SumsThreads / 32;
        if (mostBlocks > 0)
        {
            int groups = (int)Math.Min(MostSumsBlocks, (mostBlocks + BlocksPerGroup - 1) / BlocksPerGroup);
            _kernels.Launch(
                _kernels.DigestSums, _device.Beside, new Grid(groups, pieces.Length), SumsThreads, 0, _pieces.Pointer, _sums.Pointer);
        }

        _kernels.Launch(_kernels.DigestChain, _device.Beside, new Grid(pieces.Length), ChainThreads, 0,
            _pieces.Pointer, _sums.Pointer, _states.Pointer, _digests.Pointer);
        _device.Beside.Synchronize(); // the pieces are in the caller's memory
    }

    private byte[] OnHost(nuint pointer, int bytes)
    {
        byte[] tensor = new byte[bytes];
        if (bytes > 0)
            _device.Download(pointer, tensor, _device.Beside);
        return _onHost(tensor);
    }

    private static byte[] Canonical(UInt128 digest)
    {
        byte[] bytes = new byte[sizeof(UInt128)];
        BinaryPrimitives.WriteUInt128BigEndian(bytes, digest);
        return bytes;
    }
}
