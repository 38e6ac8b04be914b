using System.Reflection;

namespace Rollout.Kernels.Cuda;

/// <summary>The kernels of kernels/Cuda/cu, compiled for one device and one storage type, and how they are launched.</summary>
internal sealed unsafe class CudaKernels : IDisposable
{
    private static readonly Dictionary<string, string> s_headers =
        new[]
        {
            "attention.cuh", "common.cuh", "copy.cuh", "elements.cuh", "logits.cuh", "merge.cuh", "mma.cuh", "ring.cuh", "rope.cuh",
            "truncation.cuh", "xxh3.cuh",
        }.ToDictionary(header => header, Source);

    private readonly CudaDevice _device;
    private readonly bool _storesFp32;
    private readonly List<CudaModule> _modules = [];
    private readonly Dictionary<(int HeadDim, int RowTiles), AttentionKernel> _attend = [];
    private readonly Dictionary<nint, string> _names = [];

    public CudaKernels(CudaDevice device, bool storesFp32)
    {
        _device = device;
        _storesFp32 = storesFp32;
        CudaModule step = Compile("step.cu"), sampling = Compile("sampling.cu");
        CudaModule weights = Compile("weights.cu"), apply = Compile("apply.cu");
        Embed = Function(step, "embed");
        RmsNorm = Function(step, "rms_norm");
        RmsNormAdd = Function(step, "rms_norm_add");
        RmsNormColumns = Function(step, "rms_norm_columns");
        RopeStore = Function(step, "rope_store");
        GatedSilu = Function(step, "gated_silu");
        Gather = Function(step, "gather");
        Round = Function(step, "round_values");
        Widen = Function(step, "widen_values");
        Sample = Function(sampling, "sample");
        WriteMatrix = Function(weights, "write_matrix");
        WriteVector = Function(weights, "write_vector");
        ScatterMatrix = Function(weights, "scatter_matrix");
        ScatterVector = Function(weights, "scatter_vector");
        FillPattern = Function(weights, "fill_pattern");
        CompareRows = Function(weights, "compare_rows");
        Apply = Function(apply, "apply");
    }

    public nint Embed { get; }

    public nint RmsNorm { get; }

    public nint RmsNormAdd { get; }

    public nint RmsNormColumns { get; }

    public nint RopeStore { get; }

    public nint GatedSilu { get; }

    public nint Gather { get; }

    public nint Round { get; }

    public nint Widen { get; }

    public nint Sample { get; }

    public nint WriteMatrix { get; }

    public nint WriteVector { get; }

    public nint ScatterMatrix { get; }

    public nint ScatterVector { get; }

    public nint FillPattern { get; }

    public nint CompareRows { get; }

    public nint Apply { get; }

    /// <summary>Attention for heads of this dimension, for items of this many row tiles; compiled when first used.</summary>
    public AttentionKernel Attend(int headDim, int rowTiles)
    {
        if (!_attend.TryGetValue((headDim, rowTiles), out AttentionKernel kernel))
        {
            int sharedBytes = AttentionKernel.SharedBytesOf(headDim, rowTiles, _storesFp32 ? sizeof(float) : sizeof(ushort));
            CudaModule module = Compile("attention.cu", AttentionDefinitions(headDim, rowTiles, _storesFp32));
            nint function = Function(module, "attend");
            Driver.cuFuncSetAttribute(function, CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, sharedBytes)
                .ThrowIfFailed($"attend, {sharedBytes} bytes of shared memory");
            int threads = AttentionKernel.ThreadsOf(rowTiles);
            Driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(out int blocks, function, threads, (nuint)sharedBytes)
                .ThrowIfFailed("attend");
            _attend[(headDim, rowTiles)] = kernel = new AttentionKernel(function, threads, sharedBytes, blocks * _device.Multiprocessors);
        }

        return kernel;
    }

    /// <summary>
    /// Queues a kernel. Arguments are those of its source, in order. Where the device supports it, a step's kernel is started while the
    /// previous one still runs: all of them begin with wait_for_earlier_kernels of common.cuh.
    /// </summary>
    public void Launch(nint function, CudaStream stream, Grid grid, int threads, int sharedBytes, params ReadOnlySpan<Argument> arguments)
    {
        CudaLaunchTimes? times = stream == _device.Stream ? _device.Times : null; // measured kernels must not overlap
        CUlaunchAttribute early = new()
        {
            id = CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            value = new() { programmaticStreamSerializationAllowed = 1 },
        };
        CUlaunchConfig launch = new()
        {
            GridDimX = (uint)grid.X,
            GridDimY = (uint)grid.Y,
            GridDimZ = (uint)grid.Z,
            BlockDimX = (uint)threads,
            BlockDimY = 1,
            BlockDimZ = 1,
            SharedMemBytes = (uint)sharedBytes,
            hStream = stream.Value,
            attrs = &early,
            numAttrs = _device.StartsKernelsEarly && stream == _device.Stream && times is null ? 1u : 0u,
        };
        void** pointers = stackalloc void*[arguments.Length];
        fixed (Argument* values = arguments)
        {
            for (int i = 0; i < arguments.Length; i++)
                pointers[i] = values + i;
            times?.Before(_names[function]);
            CUresult result = Driver.cuLaunchKernelEx(&launch, function, pointers, null);
            if (result != CUresult.CUDA_SUCCESS)
            {
                result.ThrowIfFailed(
                    $"{_names[function]}, {grid.X} x {grid.Y} x {grid.Z} blocks of {threads}", nameof(Driver.cuLaunchKernelEx));
            }

            times?.After();
        }
    }

    public void Dispose() => _modules.ForEach(module => module.Dispose());

    private nint Function(CudaModule module, string name)
    {
        nint function = module.Function(name);
        _names[function] = name;
        return function;
    }

    private CudaModule Compile(string file, params string[] definitions)
    {
        CudaModule module = _device.Load(Compile(_device.Architecture, _storesFp32, file, definitions), file);
        _modules.Add(module);
        return module;
    }

    /// <summary>The code of a source for an architecture ("sm_90") and a storage type.</summary>
    internal static byte[] Compile(string architecture, bool storesFp32, string file, params string[] definitions) =>
        // Without contraction a product and a sum are rounded as written, by every compiler; the source says fmaf where they are to be
        // fused.
        CudaCompiler.Compile(file, Source(file), s_headers,
            [$"--gpu-architecture={architecture}", "--std=c++17", "--fmad=false", $"-DSTORE_BF16={(storesFp32 ? 0 : 1)}", .. definitions]);

    /// <summary>Of attention.cu.</summary>
    internal static string[] AttentionDefinitions(int headDim, int rowTiles, bool storesFp32) =>
    [
        $"-DHEAD_DIM={headDim}", $"-DROW_TILES={rowTiles}",
        $"-DSHARED_BYTES={AttentionKernel.SharedBytesOf(headDim, rowTiles, storesFp32 ? sizeof(float) : sizeof(ushort))}",
    ];

    private static string Source(string file)
    {
        using Stream stream = Assembly.GetExecutingAssembly().GetManifestResourceStream(file)
            ?? throw new InvalidOperationException($"{file} is not embedded.");
        using StreamReader reader = new(stream);
        return reader.ReadToEnd();
    }
}

/// <summary>The kernel of attention.cu for one head dimension, for items of 16 queries (rows times heads) or a multiple of that.</summary>
/// <param name="Function">The driver's handle.</param>
/// <param name="Threads">Of a block.</param>
/// <param name="SharedBytes">Of a block.</param>
/// <param name="Resident">Blocks that run at the same time on the whole device.</param>
internal readonly record struct AttentionKernel(nint Function, int Threads, int SharedBytes, int Resident)
{
    /// <summary>Queries of a row tile.</summary>
    public const int TileQueries = 16;

    /// <summary>Row tiles of the largest items: the most that registers and shared memory of a multiprocessor hold.</summary>
    public static int MostRowTiles(int headDim) => headDim <= 128 ? 4 : 2;

    // As in attention.cu, which refuses to compile where it needs more.
    public static int ThreadsOf(int rowTiles) => rowTiles == 1 ? 128 : 256;

    public static int SharedBytesOf(int headDim, int rowTiles, int storedBytes)
    {
        const int Stages = 4, StageTokens = 32, RowNumbers = 11, RowRoom = 12;
        const int Chunk = CudaAttentionPlan.Chunk, Blocks = 2 * Chunk / KvCache.BlockTokens;
        int padded = (headDim + 15) / 16 * 16, queries = rowTiles * TileQueries;
        int staged = (Stages * StageTokens * ((padded * storedBytes) + 16)) + (2 * padded * storedBytes);
        return staged + (((queries * (padded + RowRoom + Chunk + RowRoom + RowNumbers)) + Blocks) * sizeof(float));
    }

    /// <summary>Blocks that take items in turn: enough to fill the device, where every item needs `each`.</summary>
    public int BlocksFor(int items, int each) => Math.Min(items, (Resident + each - 1) / each);
}

/// <summary>Blocks of a launch.</summary>
internal readonly record struct Grid(int X, int Y = 1, int Z = 1);

/// <summary>
/// A kernel's argument: a pointer to device memory, or a number of 4 or 8 bytes. A launch reads the bytes of the kernel's parameter.
/// </summary>
internal readonly struct Argument
{
    private readonly ulong _bits;

    private Argument(ulong bits) => _bits = bits;

    public nuint Pointer => (nuint)_bits;

    public int Int => (int)_bits;

    public static implicit operator Argument(nuint pointer) => new(pointer);

    public static implicit operator Argument(int value) => new((uint)value);

    public static implicit operator Argument(long value) => new((ulong)value);

    public static implicit operator Argument(float value) => new(BitConverter.SingleToUInt32Bits(value));
}
