using System.Security.Cryptography;
using System.Text;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// y = x · Wᵀ by cuBLASLt: with <b>one algorithm per weight shape for all row counts</b>, which sums over the whole of k in one piece, so that a row's
/// bits do not depend on how many rows there are. Candidates are the library's own for few, some and many rows; of those that fit all counts, and
/// whose rows are found to be the same bits for every one, the fastest is taken, and remembered on disk.
/// <para>Row-major [rows, outputs] is cuBLASLt's column-major [outputs, rows]: A is the weight transposed, B the activations.</para>
/// </summary>
internal sealed unsafe class CudaMatMul : IDisposable
{
    private const int WorkspaceBytes = 32 << 20;

    /// <summary>Few, some, many: what decides between candidates, and where they come from.</summary>
    private static readonly int[] s_rows = [1, 16, 64, 256];

    private readonly CudaDevice _device;
    private readonly cudaDataType _type;
    private readonly long _elementBytes;
    private readonly nint _handle;
    private readonly DeviceBuffer _workspace;
    private readonly Dictionary<(int Outputs, int Inputs), Shape> _shapes = [];
    private readonly AlgorithmFile _file;

    public CudaMatMul(CudaDevice device, bool storesFp32)
    {
        _device = device;
        _type = storesFp32 ? cudaDataType.CUDA_R_32F : cudaDataType.CUDA_R_16BF;
        _elementBytes = storesFp32 ? 4 : 2;
        device.MakeCurrent();
        CublasLt.cublasLtCreate(out _handle).ThrowIfFailed();
        _workspace = device.Allocate(WorkspaceBytes);
        _file = new AlgorithmFile($"{device.Name} {device.Architecture} cublasLt {CublasLt.cublasLtGetVersion()} {_type}");
    }

    /// <summary>Finds the algorithm of a shape, so that no step has to.</summary>
    public void Prepare(int outputs, int inputs) => _ = ShapeOf(outputs, inputs);

    /// <param name="input">[rows, inputs] in the storage type.</param>
    /// <param name="weight">[outputs, inputs] in the storage type.</param>
    /// <param name="bias">fp32 [outputs], or 0.</param>
    /// <param name="output">fp32 [rows, outputs].</param>
    /// <param name="rows">At least 1.</param>
    /// <param name="outputs">Of the weight.</param>
    /// <param name="inputs">Of the weight.</param>
    /// <param name="add">Onto what stands in the output.</param>
    public void Multiply(nuint input, nuint weight, nuint bias, nuint output, int rows, int outputs, int inputs, bool add)
    {
        Shape shape = ShapeOf(outputs, inputs);
        CudaLaunchTimes? times = _device.Times;
        times?.Before($"matmul [{outputs}, {inputs}]");
        shape.Run(input, weight, bias, output, rows, add);
        times?.After();
    }

    public void Dispose()
    {
        foreach (Shape shape in _shapes.Values)
            shape.Dispose();
        _workspace.Dispose();
        CublasLt.cublasLtDestroy(_handle).ThrowIfFailed();
    }

    private Shape ShapeOf(int outputs, int inputs)
    {
        if (_shapes.TryGetValue((outputs, inputs), out Shape? known))
            return known;
        Shape shape = new(this, outputs, inputs);
        if (_file.TryRead(outputs, inputs, out cublasLtMatmulAlgo algorithm) && shape.Fits(algorithm))
            shape.Algorithm = algorithm;
        else
            _file.Write(outputs, inputs, shape.Algorithm = Tune(shape));
        return _shapes[(outputs, inputs)] = shape;
    }

    /// <summary>The fastest of the candidates that keep rows apart.</summary>
    private cublasLtMatmulAlgo Tune(Shape shape)
    {
        int most = s_rows[^1];
        using DeviceBuffer input = Pattern((long)most * shape.Inputs), weight = Pattern((long)shape.Outputs * shape.Inputs);
        using DeviceBuffer output = _device.AllocateZeroed((long)most * shape.Outputs * sizeof(float));
        List<cublasLtMatmulAlgo> candidates = [.. s_rows.SelectMany(shape.Candidates).Distinct(AlgorithmComparer.Instance).Where(shape.Fits)];
        cublasLtMatmulAlgo? best = null;
        double least = double.MaxValue;
        foreach (cublasLtMatmulAlgo candidate in candidates)
        {
            shape.Algorithm = candidate;
            if (!KeepsRowsApart())
                continue;
            double seconds = s_rows.Sum(Seconds);
            if (seconds < least)
                (best, least) = (candidate, seconds);
        }

        return best ?? throw new CudaException($"None of {candidates.Count} cuBLASLt algorithms for a matmul of [{shape.Outputs}, {shape.Inputs}] "
            + $"gives a row the same bits whatever the number of rows, on {_device.Name}.");

        bool KeepsRowsApart()
        {
            float[] whole = Rows(most);
            return s_rows[..^1].Append(3).All(rows => whole.AsSpan(0, rows * shape.Outputs).SequenceEqual(Rows(rows)));
        }

        float[] Rows(int rows)
        {
            shape.Run(input.Pointer, weight.Pointer, 0, output.Pointer, rows, add: false);
            float[] values = new float[rows * shape.Outputs];
            _device.Download(output.Pointer, System.Runtime.InteropServices.MemoryMarshal.AsBytes(values.AsSpan()));
            return values;
        }

        double Seconds(int rows)
        {
            const int Times = 5;
            shape.Run(input.Pointer, weight.Pointer, 0, output.Pointer, rows, add: false);
            _device.Stream.Synchronize();
            long start = System.Diagnostics.Stopwatch.GetTimestamp();
            for (int i = 0; i < Times; i++)
                shape.Run(input.Pointer, weight.Pointer, 0, output.Pointer, rows, add: false);
            _device.Stream.Synchronize();
            return System.Diagnostics.Stopwatch.GetElapsedTime(start).TotalSeconds / Times;
        }
    }

    /// <summary>Values of many magnitudes, so that every order of a sum rounds otherwise.</summary>
    private DeviceBuffer Pattern(long elements)
    {
        byte[] bytes = new byte[elements * _elementBytes];
        uint state = 1;
        for (long i = 0; i < elements; i++)
        {
            state = (state * 1664525) + 1013904223;
            float value = ((state >> 9) / (float)(1 << 22)) - 1f; // [-1, 1)
            uint bits = BitConverter.SingleToUInt32Bits(value);
            if (_elementBytes == 4)
                BitConverter.TryWriteBytes(bytes.AsSpan((int)(i * 4)), bits);
            else
                BitConverter.TryWriteBytes(bytes.AsSpan((int)(i * 2)), (ushort)(bits >> 16));
        }

        DeviceBuffer buffer = _device.Allocate(bytes.Length);
        _device.Upload(buffer.Pointer, bytes);
        return buffer;
    }

    /// <summary>What cuBLASLt has to be told of one weight shape; rows are set call by call.</summary>
    private sealed class Shape : IDisposable
    {
        private const int Transpose = 1; // CUBLAS_OP_T
        private const int EpilogueDefault = 1, EpilogueBias = 4;
        private const int Wanted = 16;

        private readonly CudaMatMul _owner;
        private readonly nint _plain, _biased; // descriptions
        private readonly nint _weight, _input, _output; // layouts
        private cublasLtMatmulAlgo _algorithm;
        private int _rows = 1;

        public Shape(CudaMatMul owner, int outputs, int inputs)
        {
            _owner = owner;
            Outputs = outputs;
            Inputs = inputs;
            _plain = Describe(EpilogueDefault);
            _biased = Describe(EpilogueBias);
            _weight = Layout(owner._type, inputs, outputs, inputs);
            _input = Layout(owner._type, inputs, 1, inputs);
            _output = Layout(cudaDataType.CUDA_R_32F, outputs, 1, outputs);
        }

        public int Outputs { get; }

        public int Inputs { get; }

        public cublasLtMatmulAlgo Algorithm
        {
            get => _algorithm;
            set => _algorithm = value;
        }

        public void Run(nuint input, nuint weight, nuint bias, nuint output, int rows, bool add)
        {
            SetRows(rows);
            nint description = _plain;
            if (bias != 0)
            {
                description = _biased;
                Set(description, cublasLtMatmulDescAttributes.CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, (nuint)sizeof(nuint));
            }

            float one = 1f, beta = add ? 1f : 0f;
            fixed (cublasLtMatmulAlgo* algorithm = &_algorithm)
            {
                cublasStatus status = CublasLt.cublasLtMatmul(
                    _owner._handle, description, &one, weight, _weight, input, _input, &beta, output, _output, output, _output, algorithm,
                    _owner._workspace.Pointer, WorkspaceBytes, _owner._device.Stream.Value);
                if (status != cublasStatus.CUBLAS_STATUS_SUCCESS) // no text is made where it is not needed: this runs in every step
                    status.ThrowIfFailed($"{rows} rows of [{Outputs}, {Inputs}]", nameof(CublasLt.cublasLtMatmul));
            }
        }

        /// <summary>What the library would take for so many rows, of what sums over k in one piece.</summary>
        public IEnumerable<cublasLtMatmulAlgo> Candidates(int rows)
        {
            SetRows(rows);
            List<cublasLtMatmulAlgo> found = [];
            CublasLt.cublasLtMatmulPreferenceCreate(out nint preference).ThrowIfFailed();
            try
            {
                ulong workspace = WorkspaceBytes;
                uint noReduction = 0;
                Prefer(cublasLtMatmulPreferenceAttributes.CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(ulong));
                Prefer(cublasLtMatmulPreferenceAttributes.CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &noReduction, sizeof(uint));
                cublasLtMatmulHeuristicResult* results = stackalloc cublasLtMatmulHeuristicResult[Wanted];
                CublasLt.cublasLtMatmulAlgoGetHeuristic(
                    _owner._handle, _plain, _weight, _input, _output, _output, preference, Wanted, results, out int count)
                    .ThrowIfFailed($"{rows} rows of [{Outputs}, {Inputs}]");
                for (int i = 0; i < count; i++)
                {
                    if (results[i].State == cublasStatus.CUBLAS_STATUS_SUCCESS && InOnePiece(&results[i].Algorithm))
                        found.Add(results[i].Algorithm);
                }
            }
            finally
            {
                CublasLt.cublasLtMatmulPreferenceDestroy(preference).ThrowIfFailed();
            }

            return found;

            void Prefer(cublasLtMatmulPreferenceAttributes attribute, void* value, nuint bytes) =>
                CublasLt.cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, bytes).ThrowIfFailed($"{attribute}");
        }

        /// <summary>Whether an algorithm serves every row count, with a bias and without.</summary>
        public bool Fits(cublasLtMatmulAlgo algorithm)
        {
            foreach (int rows in s_rows)
            {
                SetRows(rows);
                foreach (nint description in (ReadOnlySpan<nint>)[_plain, _biased])
                {
                    if (CublasLt.cublasLtMatmulAlgoCheck(
                            _owner._handle, description, _weight, _input, _output, _output, &algorithm, out cublasLtMatmulHeuristicResult result)
                        != cublasStatus.CUBLAS_STATUS_SUCCESS
                        || result.State != cublasStatus.CUBLAS_STATUS_SUCCESS || result.WorkspaceBytes > WorkspaceBytes)
                        return false;
                }
            }

            return true;
        }

        public void Dispose()
        {
            foreach (nint layout in (ReadOnlySpan<nint>)[_weight, _input, _output])
                CublasLt.cublasLtMatrixLayoutDestroy(layout).ThrowIfFailed();
            foreach (nint description in (ReadOnlySpan<nint>)[_plain, _biased])
                CublasLt.cublasLtMatmulDescDestroy(description).ThrowIfFailed();
        }

        private void SetRows(int rows)
        {
            if (rows == _rows)
                return;
            _rows = rows;
            ulong columns = (ulong)rows;
            foreach (nint layout in (ReadOnlySpan<nint>)[_input, _output])
            {
                CublasLt.cublasLtMatrixLayoutSetAttribute(
                    layout, cublasLtMatrixLayoutAttribute.CUBLASLT_MATRIX_LAYOUT_COLS, &columns, sizeof(ulong)).ThrowIfFailed();
            }
        }

        private static bool InOnePiece(cublasLtMatmulAlgo* algorithm)
        {
            int pieces, reduction;
            CublasLt.cublasLtMatmulAlgoConfigGetAttribute(
                algorithm, cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &pieces, sizeof(int), out _).ThrowIfFailed();
            CublasLt.cublasLtMatmulAlgoConfigGetAttribute(
                algorithm, cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &reduction, sizeof(int), out _).ThrowIfFailed();
            return pieces <= 1 && reduction == 0;
        }

        private static nint Describe(int epilogue)
        {
            CublasLt.cublasLtMatmulDescCreate(out nint description, cublasComputeType.CUBLAS_COMPUTE_32F, cudaDataType.CUDA_R_32F).ThrowIfFailed();
            int transpose = Transpose;
            Set(description, cublasLtMatmulDescAttributes.CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(int));
            Set(description, cublasLtMatmulDescAttributes.CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof(int));
            return description;
        }

        private static nint Layout(cudaDataType type, int rows, int columns, int leadingDimension)
        {
            CublasLt.cublasLtMatrixLayoutCreate(out nint layout, type, (ulong)rows, (ulong)columns, leadingDimension)
                .ThrowIfFailed($"[{rows}, {columns}]");
            return layout;
        }

        private static void Set(nint description, cublasLtMatmulDescAttributes attribute, void* value, nuint bytes) =>
            CublasLt.cublasLtMatmulDescSetAttribute(description, attribute, value, bytes).ThrowIfFailed();
    }

    private sealed class AlgorithmComparer : IEqualityComparer<cublasLtMatmulAlgo>
    {
        public static readonly AlgorithmComparer Instance = new();

        public bool Equals(cublasLtMatmulAlgo x, cublasLtMatmulAlgo y) => AlgorithmFile.ToText(x) == AlgorithmFile.ToText(y);

        public int GetHashCode(cublasLtMatmulAlgo algorithm) => AlgorithmFile.ToText(algorithm).GetHashCode(StringComparison.Ordinal);
    }

    /// <summary>Choices for one device and library, a line each: outputs, inputs, the algorithm in hexadecimal.</summary>
    private sealed class AlgorithmFile(string key)
    {
        private readonly string _path = Path.Combine(
            CudaCompiler.CacheFolder, $"matmul-{Convert.ToHexStringLower(SHA256.HashData(Encoding.UTF8.GetBytes(key)))[..32]}.txt");

        public static string ToText(cublasLtMatmulAlgo algorithm) =>
            Convert.ToHexStringLower(new ReadOnlySpan<byte>(&algorithm, sizeof(cublasLtMatmulAlgo)));

        public bool TryRead(int outputs, int inputs, out cublasLtMatmulAlgo algorithm)
        {
            algorithm = default;
            if (!File.Exists(_path))
                return false;
            string start = $"{outputs} {inputs} ";
            string? line = File.ReadLines(_path).LastOrDefault(line => line.StartsWith(start, StringComparison.Ordinal));
            if (line is null || line.Length != start.Length + (2 * sizeof(cublasLtMatmulAlgo)))
                return false;
            byte[] bytes = Convert.FromHexString(line.AsSpan(start.Length));
            algorithm = System.Runtime.InteropServices.MemoryMarshal.Read<cublasLtMatmulAlgo>(bytes);
            return true;
        }

        /// <summary>One write of one line, so that processes that start together do not mix theirs. Where it cannot be kept, the next start tunes again.</summary>
        public void Write(int outputs, int inputs, cublasLtMatmulAlgo algorithm)
        {
            try
            {
                Directory.CreateDirectory(CudaCompiler.CacheFolder);
                File.AppendAllText(_path, $"{outputs} {inputs} {ToText(algorithm)}\n");
            }
            catch (Exception e) when (e is IOException or UnauthorizedAccessException)
            {
            }
        }
    }
}
