using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>Writing and reading weights, concurrently with steps, from any thread.</summary>
public sealed unsafe partial class CudaBackend
{
    protected override void WriteWeightCore(Weight destination, long element, ReadOnlySpan<byte> source, DType type)
    {
        CudaWeight weight = (CudaWeight)destination;
        bool asStored = IsStored(weight, type);
        lock (Device.Copies)
        {
            BeginWrite(weight);
            while (!source.IsEmpty)
            {
                int bytes = Math.Min(source.Length, StagingBytes), count = bytes / type.Size();
                nuint to = At(weight, element);
                CopyIn(asStored ? to : _staging.Pointer, source[..bytes]);
                if (!asStored)
                    Convert(weight, to, _staging.Pointer, count, type);
                Device.Beside.Synchronize();
                element += count;
                source = source[bytes..];
            }
        }
    }

    protected override void WriteWeightElementsCore(
        Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type)
    {
        CudaWeight weight = (CudaWeight)destination;
        nint function = weight.IsVector ? _kernels.ScatterVector : _kernels.ScatterMatrix;
        lock (Device.Copies)
        {
            BeginWrite(weight);
            for (int done = 0; done < indices.Length;)
            {
                int count = Math.Min(indices.Length - done, StagingBytes / sizeof(uint));
                CopyIn(_stagedIndices.Pointer, MemoryMarshal.AsBytes(indices.Slice(done, count)));
                CopyIn(_staging.Pointer, values.Slice(done * type.Size(), count * type.Size()));
                _kernels.Launch(
                    function, Device.Beside, Blocks(count), Threads, 0, _staging.Pointer, (int)type,
                    _stagedIndices.Pointer, At(weight, element), (long)count);
                Device.Beside.Synchronize();
                done += count;
            }
        }
    }

    protected override void CopyWeightCore(Weight source, Weight destination)
    {
        (CudaWeight from, CudaWeight to) = ((CudaWeight)source, (CudaWeight)destination);
        lock (Device.Copies)
        {
            BeginWrite(to);
            Driver.cuMemcpyDtoDAsync_v2(to.Pointer, from.Pointer, (nuint)from.Bytes, Device.Beside.Value).ThrowIfFailed(from.Bytes);
            Device.Beside.Synchronize();
        }
    }

    protected override void ReadWeightCore(Weight source, long element, Span<float> destination)
    {
        CudaWeight weight = (CudaWeight)source;
        Device.MakeCurrent();
        lock (Device.Copies)
            CopyOut(At(weight, element), weight.IsVector || StoresFp32, destination, Device.Beside);
    }

    // ---- Copies concurrent with steps; the caller holds Device.Copies.

    /// <summary>Waits for a step that still reads the weight: one that was begun before and ended without an answer.</summary>
    private void BeginWrite(CudaWeight weight)
    {
        Device.MakeCurrent();
        if (MayBeRead(weight))
            Device.Stream.Synchronize();
    }

    private bool MayBeRead(CudaWeight weight) => weight.LastStep > Interlocked.Read(ref _stepsDone);

    /// <summary>Whether the weight stores elements of the type unconverted.</summary>
    private bool IsStored(CudaWeight weight, DType type) => type == (weight.IsVector || StoresFp32 ? DType.Float32 : DType.BFloat16);

    private void Convert(CudaWeight weight, nuint destination, nuint source, int count, DType type) => _kernels.Launch(
        weight.IsVector ? _kernels.WriteVector : _kernels.WriteMatrix, Device.Beside, Blocks(count), Threads, 0,
        source, (int)type, destination, (long)count);

    private void CopyIn(nuint destination, ReadOnlySpan<byte> source)
    {
        fixed (byte* bytes = source)
        {
            Driver.cuMemcpyHtoDAsync_v2(destination, bytes, (nuint)source.Length, Device.Beside.Value).ThrowIfFailed(source.Length);
            Device.Beside.Synchronize(); // the caller's bytes may change when this returns
        }
    }

    private void CopyOut(nuint source, bool fp32, Span<float> destination, CudaStream stream)
    {
        if (fp32)
        {
            Device.Download(source, MemoryMarshal.AsBytes(destination), stream);
            return;
        }

        ushort[] stored = new ushort[destination.Length];
        Device.Download(source, MemoryMarshal.AsBytes(stored.AsSpan()), stream);
        for (int i = 0; i < stored.Length; i++)
            destination[i] = BitConverter.UInt32BitsToSingle((uint)stored[i] << 16);
    }

    private nuint At(CudaWeight weight, long element) =>
        weight.Pointer + (nuint)(element * (weight.IsVector ? sizeof(float) : StoredBytes));
}
