using System.Runtime.InteropServices;
using System.Security.Cryptography;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// Runs algorithms of one shape on numbers that are the same in every process, and reports the bits of the results and the time. The
/// activations' rows repeat after <see cref="Period"/>, a prime, so that equal rows occur at every place of a tile: their results have to
/// be equal too.
/// </summary>
internal sealed unsafe class MatMulProbe : IDisposable
{
    /// <summary>Different rows of activations.</summary>
    public const int Period = 31;

    /// <summary>Rows of the run that digests are computed from, and that all other row counts are compared with.</summary>
    public const int ReferenceRows = 64;

    private static readonly (bool Bias, bool Add)[] s_forms = [(false, false), (true, false), (false, true), (true, true)];

    private const int Threads = 256;            // a block of fill_pattern and compare_rows
    private const int Units = 32;               // a thread: elements of the one, 16 bytes of the other
    private const int DigestedBytes = 4 << 20;  // at a time
    private const int Launches = 20;            // timed together, at least

    private readonly CudaDevice _device;
    private readonly CudaKernels _kernels;
    private readonly MatMulShape _shape;
    private readonly DeviceBuffer _workspace;
    private readonly List<DeviceBuffer> _buffers = [];
    private readonly DeviceBuffer _input, _weight, _output, _bias, _before, _reference, _different;
    private readonly long _rowBytes; // of the output
    private DeviceBuffer? _copies;

    /// <param name="device">To run on, by its first stream.</param>
    /// <param name="kernels">Of the device.</param>
    /// <param name="shape">What to run.</param>
    /// <param name="workspace">Of <see cref="MatMulShape.WorkspaceBytes"/>.</param>
    /// <param name="mostRows">The largest row count that will be run; at least <see cref="ReferenceRows"/> are allocated.</param>
    /// <exception cref="OutOfMemoryException">Not enough memory for a weight, activations and outputs of this many rows.</exception>
    public MatMulProbe(CudaDevice device, CudaKernels kernels, MatMulShape shape, DeviceBuffer workspace, int mostRows)
    {
        _device = device;
        _kernels = kernels;
        _shape = shape;
        _workspace = workspace;
        mostRows = Math.Max(mostRows, ReferenceRows);
        _rowBytes = (long)shape.Outputs * shape.OutputBytes;
        int periods = 1; // compare_rows takes whole units of 16 bytes
        while (periods * Period * _rowBytes % 16 != 0)
            periods *= 2;
        try
        {
            _weight = Take((long)shape.Outputs * shape.Inputs * shape.StoredBytes);
            _input = Take((long)mostRows * shape.Inputs * shape.StoredBytes);
            _output = Take(mostRows * _rowBytes);
            _bias = Take(shape.Outputs * sizeof(float));
            _before = Take(Period * _rowBytes);
            _reference = Take(periods * Period * _rowBytes);
            _different = Take(sizeof(uint));
        }
        catch
        {
            Dispose();
            throw;
        }

        Fill(_weight, shape.StoredBytes, 1, (long)shape.Outputs * shape.Inputs);
        Fill(_input, shape.StoredBytes, 2, (long)Period * shape.Inputs);
        Fill(_bias, sizeof(float), 3, shape.Outputs);
        Fill(_before, shape.OutputBytes, 4, (long)Period * shape.Outputs);
        Repeat(_input.Pointer, (long)Period * shape.Inputs * shape.StoredBytes, _input.Bytes);
    }

    /// <summary>The forms in which the shape is multiplied: without and with a bias, written to the output or added to it.</summary>
    public ReadOnlySpan<(bool Bias, bool Add)> Forms => s_forms.AsSpan(0, _shape.TakesBias ? s_forms.Length : 1);

    /// <summary>The bits of the first rows, at most <see cref="Period"/>, in one form.</summary>
    /// <param name="algorithm">What to run.</param>
    /// <param name="rows">How many.</param>
    /// <param name="form">One of <see cref="Forms"/>.</param>
    /// <param name="digest">SHA-256; empty where it did not run.</param>
    public cublasStatus Digest(in cublasLtMatmulAlgo algorithm, int rows, (bool Bias, bool Add) form, out byte[] digest)
    {
        digest = [];
        cublasStatus status = Run(algorithm, rows, form);
        if (status != cublasStatus.CUBLAS_STATUS_SUCCESS)
            return status;
        using IncrementalHash hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        long bytes = Math.Min(rows, Period) * _rowBytes;
        byte[] piece = new byte[Math.Min(bytes, DigestedBytes)];
        for (long done = 0; done < bytes; done += piece.Length)
        {
            Span<byte> some = piece.AsSpan(0, (int)Math.Min(piece.Length, bytes - done));
            _device.Download(_output.Pointer + (nuint)done, some);
            hash.AppendData(some);
        }

        digest = hash.GetHashAndReset();
        return status;
    }

    /// <summary>The bits of all forms in one, of at least <see cref="Period"/> rows.</summary>
    public cublasStatus Digest(in cublasLtMatmulAlgo algorithm, int rows, out byte[] digest)
    {
        digest = [];
        using IncrementalHash hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        foreach ((bool, bool) form in Forms)
        {
            cublasStatus status = Digest(algorithm, rows, form, out byte[] one);
            if (status != cublasStatus.CUBLAS_STATUS_SUCCESS)
                return status;
            hash.AppendData(one);
        }

        digest = hash.GetHashAndReset();
        return cublasStatus.CUBLAS_STATUS_SUCCESS;
    }

    /// <summary>
    /// For each of these row counts, whether it runs, and rows have the bits that they have among <see cref="ReferenceRows"/>, at every
    /// place, in every form. An algorithm that cannot be captured in a graph is refused for all.
    /// </summary>
    /// <returns>For each row count null, or why it is refused.</returns>
    public string?[] WhyNot(in cublasLtMatmulAlgo algorithm, ReadOnlySpan<int> rowCounts)
    {
        string?[] reasons = new string?[rowCounts.Length];
        for (int i = 0; i < rowCounts.Length; i++)
        {
            cublasStatus status = _shape.Check(algorithm, rowCounts[i], out _);
            if (status != cublasStatus.CUBLAS_STATUS_SUCCESS)
                reasons[i] = $"refused for {rowCounts[i]} rows ({status.Name()})";
        }

        foreach ((bool Bias, bool Add) form in Forms)
        {
            cublasStatus reference = TakeReference(algorithm, form);
            if (reference == cublasStatus.CUBLAS_STATUS_SUCCESS)
            {
                QueueComparison(ReferenceRows);
                if (Differences() > 0)
                {
                    Array.Fill(reasons, "the bits of a row depend on its place");
                    return reasons;
                }
            }

            uint known = 0;
            for (int i = 0; i < rowCounts.Length; i++)
            {
                if (reasons[i] is not null)
                    continue;
                cublasStatus status = reference == cublasStatus.CUBLAS_STATUS_SUCCESS ? Run(algorithm, rowCounts[i], form) : reference;
                if (status != cublasStatus.CUBLAS_STATUS_SUCCESS)
                {
                    reasons[i] = $"did not run ({status.Name()})";
                    continue;
                }

                QueueComparison(rowCounts[i]);
                uint differences = Differences();
                if (differences != known)
                    reasons[i] = "the bits of a row depend on the number of rows";
                known = differences;
            }
        }

        if (!IsSameInGraph(algorithm))
            Array.Fill(reasons, "cannot be captured");
        return reasons;
    }

    /// <summary>Keeps the rows of a run of <see cref="ReferenceRows"/>, for <see cref="QueueComparison"/>.</summary>
    public cublasStatus TakeReference(in cublasLtMatmulAlgo algorithm, (bool Bias, bool Add) form)
    {
        cublasStatus status = Run(algorithm, ReferenceRows, form);
        if (status != cublasStatus.CUBLAS_STATUS_SUCCESS)
            return status;
        Copy(_reference.Pointer, _output.Pointer, Period * _rowBytes);
        Repeat(_reference.Pointer, Period * _rowBytes, _reference.Bytes);
        Set(_different.Pointer, 0, _different.Bytes);
        return status;
    }

    /// <summary>Queues a run.</summary>
    public cublasStatus Run(in cublasLtMatmulAlgo algorithm, int rows, (bool Bias, bool Add) form)
    {
        if (form.Add)
        {
            Copy(_output.Pointer, _before.Pointer, Math.Min(rows, Period) * _rowBytes);
            Repeat(_output.Pointer, Period * _rowBytes, rows * _rowBytes);
        }
        else
        {
            Set(_output.Pointer, 0xFF, rows * _rowBytes); // so that no result of another run is left
        }

        return _shape.Run(
            algorithm, _input.Pointer, _weight.Pointer, form.Bias ? _bias.Pointer : 0, _output.Pointer, rows, form.Add, _workspace.Pointer,
            _device.Stream);
    }

    /// <summary>Queues a comparison of the output's rows with the reference.</summary>
    public void QueueComparison(int rows)
    {
        long bytes = rows * _rowBytes;
        Launch(_kernels.CompareRows, (bytes / 16) + 1, _output.Pointer, _reference.Pointer, bytes, _reference.Bytes, _different.Pointer);
    }

    /// <summary>What comparisons have found since the reference was recorded.</summary>
    public uint Differences()
    {
        uint count = 0;
        _device.Download(_different.Pointer, MemoryMarshal.AsBytes(new Span<uint>(ref count)));
        return count;
    }

    /// <summary>
    /// Seconds of one matmul, by the device's clock: many are launched as one graph, and read in turn copies of the weight that together
    /// exceed its L2 cache, as a model's weights do. Infinity where the algorithm cannot be captured.
    /// </summary>
    public double Seconds(in cublasLtMatmulAlgo algorithm, int rows)
    {
        long stride = (_weight.Bytes + MatMulShape.Alignment - 1) / MatMulShape.Alignment * MatMulShape.Alignment;
        int copies = (int)Math.Max(1, ((5L * _device.L2Bytes / 2) + stride - 1) / stride);
        if (_copies is null && copies > 1)
        {
            _copies = Take(copies * stride);
            Copy(_copies.Pointer, _weight.Pointer, _weight.Bytes);
            Repeat(_copies.Pointer, stride, _copies.Bytes);
        }

        int launches = Math.Max(Launches, copies);
        using CudaGraph? graph = Capture(algorithm, rows, (_copies ?? _weight).Pointer, launches, copies, stride);
        if (graph is null)
            return double.PositiveInfinity;
        using CudaEvent start = _device.CreateEvent(timed: true), end = _device.CreateEvent(timed: true);
        graph.Launch(_device.Stream);
        start.Record(_device.Stream);
        graph.Launch(_device.Stream);
        end.Record(_device.Stream);
        end.Synchronize();
        return end.SecondsSince(start) / launches;
    }

    public void Dispose()
    {
        foreach (DeviceBuffer buffer in _buffers)
            buffer.Dispose();
    }

    private bool IsSameInGraph(in cublasLtMatmulAlgo algorithm)
    {
        if (TakeReference(algorithm, s_forms[0]) != cublasStatus.CUBLAS_STATUS_SUCCESS)
            return false;
        using CudaGraph? graph = Capture(algorithm, ReferenceRows, _weight.Pointer, 1, 1, 0);
        if (graph is null)
            return false;
        Set(_output.Pointer, 0xFF, ReferenceRows * _rowBytes);
        graph.Launch(_device.Stream);
        QueueComparison(ReferenceRows);
        return Differences() == 0;
    }

    /// <summary>Null where the algorithm makes a call that is not permitted during capture.</summary>
    private CudaGraph? Capture(in cublasLtMatmulAlgo algorithm, int rows, nuint weights, int launches, int copies, long stride)
    {
        cublasStatus status = cublasStatus.CUBLAS_STATUS_SUCCESS;
        CudaGraph.BeginCapture(_device.Stream);
        for (int i = 0; i < launches && status == cublasStatus.CUBLAS_STATUS_SUCCESS; i++)
        {
            nuint weight = weights + (nuint)(i % copies * stride);
            status = _shape.Run(
                algorithm, _input.Pointer, weight, 0, _output.Pointer, rows, add: false, _workspace.Pointer, _device.Stream);
        }

        CudaGraph? graph = null;
        try
        {
            graph = _device.EndCapture();
        }
        catch (CudaException) when (status != cublasStatus.CUBLAS_STATUS_SUCCESS)
        {
            // The capture failed with the matmul's status, which is reported.
        }

        if (status == cublasStatus.CUBLAS_STATUS_SUCCESS)
            return graph;
        graph?.Dispose();
        return null;
    }

    private DeviceBuffer Take(long bytes)
    {
        DeviceBuffer buffer = _device.Allocate(bytes);
        _buffers.Add(buffer);
        return buffer;
    }

    private void Fill(DeviceBuffer buffer, int elementBytes, int seed, long count) =>
        Launch(_kernels.FillPattern, count, buffer.Pointer, elementBytes, seed, count);

    private void Launch(nint function, long units, params ReadOnlySpan<Argument> arguments)
    {
        long blocks = (units + (Threads * Units) - 1) / (Threads * Units);
        _kernels.Launch(function, _device.Stream, new Grid((int)blocks), Threads, 0, arguments);
    }

    /// <summary>Repeats the beginning over the whole buffer.</summary>
    private void Repeat(nuint start, long period, long bytes)
    {
        for (long done = period; done < bytes; done *= 2)
            Copy(start + (nuint)done, start, Math.Min(done, bytes - done));
    }

    private void Copy(nuint destination, nuint source, long bytes) =>
        Driver.cuMemcpyDtoDAsync_v2(destination, source, (nuint)bytes, _device.Stream.Value).ThrowIfFailed(bytes);

    private void Set(nuint destination, byte value, long bytes) =>
        Driver.cuMemsetD8Async(destination, value, (nuint)bytes, _device.Stream.Value).ThrowIfFailed(bytes);
}
