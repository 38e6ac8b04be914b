namespace Rollout.Kernels.Cuda;

/// <summary>Weights from device memory.</summary>
public sealed partial class CudaBackend
{
    private readonly CudaApply _apply;

    public override CudaPeers Peers { get; }

    internal CudaCounts Counts
    {
        get
        {
            lock (Device.Copies)
                return new CudaCounts(_apply.Launches, _apply.Bytes, Device.Allocations, _commands.Graphs);
        }
    }

    /// <inheritdoc cref="CudaPeers.Apply"/>
    internal byte[] Apply(IReadOnlyList<DeviceTensor> parts)
    {
        ThrowIfDisposed();
        foreach (DeviceTensor part in parts)
            Check(part);
        HashSet<CudaHandle> open = [];
        lock (Device.Copies)
        {
            Device.MakeCurrent();
            try
            {
                bool isRead = false;
                foreach (DeviceTensor part in parts)
                {
                    KeepOpen(part.Memory.Handle, open);
                    isRead |= Add(part);
                }

                if (isRead)
                    Device.Stream.Synchronize();
                return _apply.Run();
            }
            finally
            {
                _apply.Clear();
                foreach (CudaHandle memory in open)
                    memory.DangerousRelease();
            }
        }
    }

    /// <inheritdoc cref="CudaPeers.Read"/>
    internal void Read(DeviceBytes memory, long offset, Span<byte> destination)
    {
        ThrowIfDisposed();
        Check(memory, offset, destination.Length);
        HashSet<CudaHandle> open = [];
        lock (Device.Copies)
        {
            KeepOpen(memory.Handle, open);
            try
            {
                Device.Download(memory.Pointer + (nuint)offset, destination, Device.Beside);
            }
            finally
            {
                memory.Handle.DangerousRelease();
            }
        }
    }

    private static void Check(DeviceBytes memory, long offset, long bytes)
    {
        if (offset < 0 || offset > memory.Bytes || bytes > memory.Bytes - offset)
        {
            throw new ArgumentOutOfRangeException(
                nameof(offset), offset, $"{bytes} bytes are not all in an allocation of {memory.Bytes}.");
        }
    }

    private void Check(in DeviceTensor part)
    {
        int size = part.Type.Size();
        if (part.Bytes <= 0 || part.Bytes % size != 0)
            throw new ArgumentOutOfRangeException(nameof(part), part.Bytes, $"Needed: whole elements of {size} bytes.");
        Check(part.Memory, part.Offset, part.Bytes);
        long elements = part.Bytes / size, next = 0;
        foreach (WeightRange store in part.Stores)
        {
            Own(store.Weight);
            Checks.Elements(store.Weight, store.Element, store.Count, nameof(part));
            if (store.First < next || store.Count > elements - store.First)
                throw new ArgumentOutOfRangeException(nameof(part), store.First, $"Stores must ascend, and end before element {elements}.");
            next = store.First + store.Count;
        }
    }

    /// <summary>Adds a part to the launch. Whether a step may still read a weight that it changes.</summary>
    private bool Add(in DeviceTensor part)
    {
        bool isRead = false;
        CudaApply.Range[] ranges = new CudaApply.Range[part.Stores.Count];
        for (int i = 0; i < ranges.Length; i++)
        {
            WeightRange store = part.Stores[i];
            CudaWeight weight = (CudaWeight)store.Weight;
            isRead |= MayBeRead(weight);
            int stored = weight.IsVector ? sizeof(float) : StoredBytes;
            ranges[i] = new CudaApply.Range(store.First, store.Count, At(weight, store.Element), weight.IsVector, stored);
        }

        _apply.Add(part.Memory.Pointer + (nuint)part.Offset, part.Bytes, part.Type, ranges);
        return isRead;
    }

    /// <summary>A memory that is closed meanwhile stays mapped until the launch has ended.</summary>
    private static void KeepOpen(CudaHandle memory, HashSet<CudaHandle> open)
    {
        if (open.Contains(memory))
            return;
        bool counted = false;
        memory.DangerousAddRef(ref counted);
        open.Add(memory);
    }
}
