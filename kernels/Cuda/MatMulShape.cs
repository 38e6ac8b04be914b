namespace Rollout.Kernels.Cuda;

/// <summary>
/// The cuBLASLt descriptors of y = x · Wᵀ for one weight shape and one type of output; rows are set in each call.
/// <para>Row-major [rows, outputs] is cuBLASLt's column-major [outputs, rows]: A is the weight transposed, B the activations.</para>
/// </summary>
internal sealed unsafe class MatMulShape : IDisposable
{
    /// <summary>The workspace of every call: a result must not depend on its size.</summary>
    public const int WorkspaceBytes = 32 << 20;

    /// <summary>Of all matrices, in trials as in steps. It is what the heuristic assumes by default.</summary>
    public const int Alignment = 256;

    /// <summary>Number of proposals requested for a row count.</summary>
    public const int MostProposals = 16;

    private readonly nint _handle;
    private readonly nint _plain, _biased; // descriptions
    private readonly nint _weight, _input, _output; // layouts
    private int _rows = 1;

    /// <param name="handle">cuBLASLt's; outlives this.</param>
    /// <param name="stored">The type of weights and activations.</param>
    /// <param name="output">The type of the output.</param>
    /// <param name="outputs">Of the weight.</param>
    /// <param name="inputs">Of the weight.</param>
    public MatMulShape(nint handle, cudaDataType stored, cudaDataType output, int outputs, int inputs)
    {
        _handle = handle;
        Outputs = outputs;
        Inputs = inputs;
        StoredBytes = BytesOf(stored);
        OutputBytes = BytesOf(output);
        _plain = Describe(CublasLt.CUBLASLT_EPILOGUE_DEFAULT);
        _biased = Describe(CublasLt.CUBLASLT_EPILOGUE_BIAS);
        _weight = Layout(stored, inputs, outputs, inputs);
        _input = Layout(stored, inputs, 1, inputs);
        _output = Layout(output, outputs, 1, outputs);
        TakesBias = output == cudaDataType.CUDA_R_32F; // a bias has the output's type, and ours are fp32
    }

    public int Outputs { get; }

    public int Inputs { get; }

    /// <summary>Of an element of the weight and of the activations.</summary>
    public int StoredBytes { get; }

    /// <summary>Of an element of the output.</summary>
    public int OutputBytes { get; }

    /// <summary>Whether it is also multiplied with a bias, and added to the output's values.</summary>
    public bool TakesBias { get; }

    /// <summary>Queues a matmul; see <see cref="CudaMatMul.Multiply"/>.</summary>
    public cublasStatus Run(
        in cublasLtMatmulAlgo algorithm, nuint input, nuint weight, nuint bias, nuint output, int rows, bool add, nuint workspace,
        CudaStream stream)
    {
        SetRows(rows);
        nint description = _plain;
        if (bias != 0)
        {
            description = _biased;
            Set(description, cublasLtMatmulDescAttributes.CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, (nuint)sizeof(nuint));
        }

        float one = 1f, beta = add ? 1f : 0f;
        fixed (cublasLtMatmulAlgo* chosen = &algorithm)
        {
            return CublasLt.cublasLtMatmul(
                _handle, description, &one, weight, _weight, input, _input, &beta, output, _output, output, _output, chosen, workspace,
                WorkspaceBytes, stream.Value);
        }
    }

    /// <summary>The library's proposals for this many rows, best first.</summary>
    /// <param name="rows">How many.</param>
    /// <param name="inPieces">Whether to include algorithms that split k.</param>
    /// <param name="found">Empty where it has none.</param>
    public cublasStatus Propose(int rows, bool inPieces, List<cublasLtMatmulAlgo> found)
    {
        found.Clear();
        SetRows(rows);
        CublasLt.cublasLtMatmulPreferenceCreate(out nint preference).ThrowIfFailed();
        try
        {
            ulong workspace = WorkspaceBytes;
            Prefer(cublasLtMatmulPreferenceAttributes.CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(ulong));
            uint noReduction = 0;
            if (!inPieces)
                Prefer(cublasLtMatmulPreferenceAttributes.CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &noReduction, sizeof(uint));
            cublasLtMatmulHeuristicResult* results = stackalloc cublasLtMatmulHeuristicResult[MostProposals];
            cublasStatus status = CublasLt.cublasLtMatmulAlgoGetHeuristic(
                _handle, _plain, _weight, _input, _output, _output, preference, MostProposals, results, out int count);
            for (int i = 0; i < count && status == cublasStatus.CUBLAS_STATUS_SUCCESS; i++)
            {
                if (results[i].State == cublasStatus.CUBLAS_STATUS_SUCCESS && (inPieces || IsInOnePiece(results[i].Algorithm)))
                    found.Add(results[i].Algorithm);
            }

            return status;
        }
        finally
        {
            CublasLt.cublasLtMatmulPreferenceDestroy(preference).ThrowIfFailed();
        }

        void Prefer(cublasLtMatmulPreferenceAttributes attribute, void* value, nuint bytes) =>
            CublasLt.cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, bytes).ThrowIfFailed($"{attribute}");
    }

    /// <summary>Whether the library says that an algorithm supports this many rows, with a bias and without, in our workspace.</summary>
    public cublasStatus Check(cublasLtMatmulAlgo algorithm, int rows, out long workspaceBytes)
    {
        SetRows(rows);
        workspaceBytes = 0;
        foreach (nint description in TakesBias ? (ReadOnlySpan<nint>)[_plain, _biased] : [_plain])
        {
            cublasStatus status = CublasLt.cublasLtMatmulAlgoCheck(
                _handle, description, _weight, _input, _output, _output, &algorithm, out cublasLtMatmulHeuristicResult result);
            if (status == cublasStatus.CUBLAS_STATUS_SUCCESS)
                status = result.State;
            if (status != cublasStatus.CUBLAS_STATUS_SUCCESS)
                return status;
            workspaceBytes = Math.Max(workspaceBytes, (long)result.WorkspaceBytes);
            if (workspaceBytes > WorkspaceBytes)
                return cublasStatus.CUBLAS_STATUS_NOT_SUPPORTED;
        }

        return cublasStatus.CUBLAS_STATUS_SUCCESS;
    }

    /// <summary>An algorithm's settings, by the numbers that the library's header gives them.</summary>
    public static string Describe(cublasLtMatmulAlgo algorithm) => string.Join(", ",
        new (string Name, cublasLtMatmulAlgoConfigAttributes Attribute)[]
        {
            ("id", cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_ID),
            ("tile", cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_TILE_ID),
            ("stages", cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_STAGES_ID),
            ("split-k", cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_SPLITK_NUM),
            ("reduction", cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME),
            ("swizzle", cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING),
            ("custom", cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION),
            ("inner", cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID),
            ("cluster", cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID),
        }.Select(setting => $"{setting.Name} {(Setting(algorithm, setting.Attribute) is { } value ? value : "?")}"));

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

    private static bool IsInOnePiece(cublasLtMatmulAlgo algorithm) =>
        Setting(algorithm, cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_SPLITK_NUM) is null or <= 1
        && Setting(algorithm, cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME) is null or 0;

    /// <summary>Null where the library does not report it. Some settings have 16 bits, the others 32.</summary>
    private static int? Setting(cublasLtMatmulAlgo algorithm, cublasLtMatmulAlgoConfigAttributes attribute)
    {
        int value = 0;
        cublasStatus status = CublasLt.cublasLtMatmulAlgoConfigGetAttribute(&algorithm, attribute, &value, BytesOf(attribute), out _);
        return status == cublasStatus.CUBLAS_STATUS_SUCCESS ? value : null;
    }

    private static nuint BytesOf(cublasLtMatmulAlgoConfigAttributes attribute) =>
        attribute is cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID
            or cublasLtMatmulAlgoConfigAttributes.CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID ? sizeof(ushort) : (nuint)sizeof(int);

    private static int BytesOf(cudaDataType type) => type == cudaDataType.CUDA_R_32F ? sizeof(float) : sizeof(ushort);

    private static nint Describe(int epilogue)
    {
        CublasLt.cublasLtMatmulDescCreate(out nint description, cublasComputeType.CUBLAS_COMPUTE_32F, cudaDataType.CUDA_R_32F)
            .ThrowIfFailed();
        int transpose = CublasLt.CUBLAS_OP_T;
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
