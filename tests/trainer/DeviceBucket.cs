using System.Runtime.InteropServices;
using Google.Protobuf;
using Rollout.Kernels.Cuda;
using Rollout.Native;
using V1 = Rollout.V1;

namespace Rollout.Trainer;

/// <summary>
/// A buffer on a device that another process may read, not at the beginning of its allocation, and an event that says when it is written.
/// </summary>
internal sealed unsafe class DeviceBucket : IDisposable
{
    /// <summary>Of the bytes in the allocation.</summary>
    public const int Offset = 512;

    private readonly CudaDevice _device;
    private readonly PinnedBuffer _pinned;
    private readonly CudaEvent _ready;
    private readonly DeviceBuffer _buffer;

    public DeviceBucket(int ordinal, int bytes)
    {
        _device = new CudaDevice(ordinal);
        _buffer = _device.Allocate(Offset + bytes);
        _pinned = _device.AllocatePinned(bytes);
        _ready = _device.CreateSharedEvent();
        Allocation = new V1.CudaAllocation
        {
            Kind = V1.CudaHandleKind.Legacy,
            Handle = Bytes(_buffer.Share()),
            DeviceUuid = ByteString.CopyFrom(_device.Uuid),
        };
        ReadyEvent = Bytes(_ready.Share());
    }

    public V1.CudaAllocation Allocation { get; }

    public ByteString ReadyEvent { get; }

    /// <summary>Queues a copy and records the event after it; waits for neither.</summary>
    public void Write(ReadOnlySpan<byte> bytes)
    {
        bytes.CopyTo(new Span<byte>(_pinned.Pointer, bytes.Length));
        _device.MakeCurrent();
        Driver.cuMemcpyHtoDAsync_v2(_buffer.Pointer + Offset, _pinned.Pointer, (nuint)bytes.Length, _device.Stream.Value).ThrowIfFailed();
        _ready.Record(_device.Stream);
    }

    public void Wait() => _device.Stream.Synchronize();

    public void Free() => _buffer.Dispose();

    public void Dispose()
    {
        _buffer.Dispose();
        _pinned.Dispose();
        _ready.Dispose();
        _device.Dispose();
    }

    private static ByteString Bytes<T>(T handle)
        where T : unmanaged => ByteString.CopyFrom(MemoryMarshal.AsBytes(new ReadOnlySpan<T>(ref handle)));
}
