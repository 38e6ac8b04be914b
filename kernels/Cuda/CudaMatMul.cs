namespace Rollout.Kernels.Cuda;

/// <summary>
/// y = x · Wᵀ by cuBLASLt, so that a row's bits do not depend on how many rows there are, nor on any measured time:
/// <see cref="MatMulTuner"/> chooses the algorithms of a shape when it is first multiplied, and they are kept on disk. Outputs in fp32 and
/// in the storage type have separate choices, because the library has different algorithms for each: for one weight the two need not agree
/// in their last bit before rounding, but an operation of a model always uses the same one. Not thread-safe.
/// </summary>
internal sealed class CudaMatMul : IDisposable
{
    private readonly CudaDevice _device;
    private readonly CudaKernels _kernels;
    private readonly cudaDataType _stored;
    private readonly nint _handle;
    private readonly DeviceBuffer _workspace;
    private readonly Dictionary<(int Outputs, int Inputs, bool Stored), Known> _known = [];
    private readonly MatMulFile _fp32File, _storedFile;

    /// <param name="device">To run on, by its first stream.</param>
    /// <param name="kernels">Of the device.</param>
    /// <param name="storesFp32">Whether the storage type is fp32; otherwise it is bf16.</param>
    /// <param name="folder">Where choices are kept.</param>
    public CudaMatMul(CudaDevice device, CudaKernels kernels, bool storesFp32, string folder)
    {
        _device = device;
        _kernels = kernels;
        _stored = storesFp32 ? cudaDataType.CUDA_R_32F : cudaDataType.CUDA_R_16BF;
        device.MakeCurrent();
        CublasLt.cublasLtCreate(out _handle).ThrowIfFailed();
        _workspace = device.Allocate(MatMulShape.WorkspaceBytes);
        string on = $"{device.Name} {device.Architecture} {device.Multiprocessors} cublasLt {CublasLt.cublasLtGetVersion()} {_stored}";
        _fp32File = new MatMulFile(folder, $"{on} {cudaDataType.CUDA_R_32F}");
        _storedFile = new MatMulFile(folder, $"{on} {_stored}");
    }

    /// <summary>
    /// Prepares a shape: the first time it chooses the algorithms, which waits for the stream and temporarily allocates memory. Needed
    /// before a multiplication that is captured.
    /// </summary>
    public void Prepare(int outputs, int inputs, MatMulOutput kind) => _ = Of(outputs, inputs, kind);

    /// <summary>Queues a matmul. All matrices must be aligned to 256 bytes, for any number of rows.</summary>
    /// <param name="input">[rows, inputs] in the storage type.</param>
    /// <param name="weight">[outputs, inputs] in the storage type.</param>
    /// <param name="bias">fp32 [outputs], or 0.</param>
    /// <param name="output">[rows, outputs] in the type that <paramref name="kind"/> says.</param>
    /// <param name="rows">At least 1.</param>
    /// <param name="outputs">Of the weight.</param>
    /// <param name="inputs">Of the weight.</param>
    /// <param name="kind">What to do with the sums.</param>
    /// <exception cref="ArgumentException">
    /// A matrix is not aligned, or there is a bias for an output in bf16, which cuBLASLt wants in bf16.
    /// </exception>
    public void Multiply(nuint input, nuint weight, nuint bias, nuint output, int rows, int outputs, int inputs, MatMulOutput kind)
    {
        if ((input | weight | output) % MatMulShape.Alignment != 0)
        {
            throw new ArgumentException(
                $"Matrices must be aligned to {MatMulShape.Alignment} bytes: algorithms were chosen for that alignment.");
        }
        Known known = Of(outputs, inputs, kind);
        if (bias != 0 && !known.Shape.TakesBias)
            throw new ArgumentException("An output in bf16 takes no bias.", nameof(bias));
        CudaLaunchTimes? times = _device.Times;
        times?.Before($"matmul [{outputs}, {inputs}]");
        for (int first = 0; first < rows; first += known.MostRows)
        {
            int some = Math.Min(known.MostRows, rows - first);
            cublasStatus status = known.Shape.Run(
                known.Choice.For(some), input + ((nuint)first * (nuint)inputs * (nuint)known.Shape.StoredBytes), weight, bias,
                output + ((nuint)first * (nuint)outputs * (nuint)known.Shape.OutputBytes), some, kind == MatMulOutput.AddFp32,
                _workspace.Pointer, _device.Stream);
            if (status != cublasStatus.CUBLAS_STATUS_SUCCESS) // the text is made only on failure: this runs in every step
                status.ThrowIfFailed($"{some} rows of [{outputs}, {inputs}]", nameof(CublasLt.cublasLtMatmul));
        }

        times?.After();
    }

    /// <summary>
    /// What every proposed algorithm for a shape computes, and how fast; see <see cref="MatMulCandidate"/>. Chooses nothing.
    /// </summary>
    public IReadOnlyList<MatMulCandidate> Survey(int outputs, int inputs, MatMulOutput kind, ReadOnlySpan<int> rows)
    {
        int most = 1;
        foreach (int count in rows)
            most = Math.Max(most, count);
        bool stored = IsStored(kind);
        using MatMulShape shape = Describe(outputs, inputs, stored);
        using MatMulProbe probe = new(_device, _kernels, shape, _workspace, most);
        return new MatMulTuner(_device, shape, probe).Survey(rows, _known.GetValueOrDefault((outputs, inputs, stored))?.Choice);
    }

    public void Dispose()
    {
        foreach (Known known in _known.Values)
            known.Shape.Dispose();
        _workspace.Dispose();
        CublasLt.cublasLtDestroy(_handle).ThrowIfFailed();
    }

    private Known Of(int outputs, int inputs, MatMulOutput kind)
    {
        bool stored = IsStored(kind);
        if (!_known.TryGetValue((outputs, inputs, stored), out Known? known))
            _known[(outputs, inputs, stored)] = known = Find(outputs, inputs, stored);
        return known;
    }

    /// <summary>The choice of an earlier start, where it is still valid, or a new one.</summary>
    private Known Find(int outputs, int inputs, bool stored)
    {
        MatMulShape shape = Describe(outputs, inputs, stored);
        try
        {
            MatMulFile file = stored ? _storedFile : _fp32File;
            int most = MatMulTuner.MostRows(_device, shape);
            if (file.Read(outputs, inputs) is { } kept && On(MatMulTuner.VerifiedRows, tuner => tuner.Holds(kept)))
                return new Known(shape, kept, most);
            MatMulChoice choice = On(most, tuner => tuner.Choose());
            file.Write(outputs, inputs, choice);
            return new Known(shape, choice, most);
        }
        catch
        {
            shape.Dispose();
            throw;
        }

        T On<T>(int rows, Func<MatMulTuner, T> ask)
        {
            using MatMulProbe probe = new(_device, _kernels, shape, _workspace, rows);
            return ask(new MatMulTuner(_device, shape, probe));
        }
    }

    private bool IsStored(MatMulOutput kind) => kind == MatMulOutput.Stored && _stored != cudaDataType.CUDA_R_32F;

    private MatMulShape Describe(int outputs, int inputs, bool stored) =>
        new(_handle, _stored, stored ? _stored : cudaDataType.CUDA_R_32F, outputs, inputs);

    private sealed record Known(MatMulShape Shape, MatMulChoice Choice, int MostRows);
}
