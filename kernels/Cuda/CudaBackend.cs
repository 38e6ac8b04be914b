using System.Diagnostics.CodeAnalysis;
using System.Numerics;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// The operations on an NVIDIA GPU. Weights, keys, values and the inputs of matmuls are bf16, or all of them fp32; sums and the residual
/// stream are fp32 either way. A step is queued operation by operation and waited for once, when its answers are read back; by then the
/// next step may be queued.
/// </summary>
public sealed unsafe partial class CudaBackend : Backend
{
    private const int Threads = 256;        // of a block, for all kernels but attention and rope
    private const int WarpThreads = 32;
    private const int StagingBytes = 8 << 20;
    private const int MostHeadDim = 256;

    private readonly CudaKernels _kernels;
    private readonly CudaMatMul _matMul;
    private readonly CudaCommands _commands;
    private readonly CudaAttentionPlan _plan = new();
    private readonly DeviceBuffer _staging, _stagedIndices; // of weights being written
    private DeviceBuffer? _partials, _counters;             // parts of attention that is cut by chunks
    private DeviceBuffer? _sampling;                        // see CudaSampleScratch
    private CudaStep? _place;
    private bool _isDecode; // every sequence of the step has one row
    private (int RowsPerItem, int Slots) _cut = (1, 0); // how the model of the last attention cuts steps
    private (int RowsPerItem, int Slots) _uploadedFor;
    private long _stepsBegun;
    private long _stepsDone;
    private int _answers, _answersBefore; // queries of this step and of the previous one that the device answers
    private StepLayout? _finishedEarly;

    /// <param name="ordinal">Which GPU.</param>
    /// <param name="format">bf16, or fp32.</param>
    /// <exception cref="CudaException">A library or the device is missing, or cannot be used; the message says which.</exception>
    public CudaBackend(int ordinal = 0, WeightFormat format = WeightFormat.BFloat16)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(ordinal);
        if (format is not (WeightFormat.BFloat16 or WeightFormat.Float32))
            throw new ArgumentOutOfRangeException(nameof(format), format, "A GPU stores bf16 or fp32.");
        WeightFormat = format;
        Device = new CudaDevice(ordinal);
        _kernels = new CudaKernels(Device, StoresFp32);
        _matMul = new CudaMatMul(Device, _kernels, StoresFp32, CudaCompiler.CacheFolder);
        _commands = new CudaCommands(Device, _kernels, _matMul);
        _staging = Device.Allocate(StagingBytes);
        _stagedIndices = Device.Allocate(StagingBytes);
        _apply = new CudaApply(Device, _kernels);
        Peers = new CudaPeers(this);
        Name = $"cuda:{ordinal} {Device.Name}, {WeightFormats.NameOf(format)}";
    }

    public override string Name { get; }

    /// <summary>GPUs that can be used; 0 where the driver or a library is missing.</summary>
    public static int DeviceCount => CudaDevice.Count;

    /// <summary>Why no GPU can be used, in one sentence; null where one can.</summary>
    public static string? WhyNoDevice => CudaDevice.WhyNone;

    public override WeightFormat WeightFormat { get; }

    public override int WriteRows => 1;

    public override long AvailableBytes => Device.FreeBytes;

    public override long HeldBytes => Device.UsedBytes;

    public override int KvElementBytes => StoredBytes;

    /// <summary>Enough for most steps that decode, so that they read the head once: 311 MB for a vocabulary of 151,936.</summary>
    public override int LogitRows => 512;

    /// <summary>Half of what is free: the trainer may share the device, and a staged update allocates a second set of weights.</summary>
    public override long KvCacheBudget => Device.FreeBytes / 2;

    /// <summary>Steps, or parts of steps, that were launched as one graph.</summary>
    public long GraphLaunches => _commands.GraphLaunches;

    /// <summary>Most memory for the parts of long contexts: see <see cref="CudaAttentionPlan"/>. Bits do not depend on it.</summary>
    internal long MostPartBytes { get; init; } = 128 << 20;

    internal CudaDevice Device { get; }

    internal bool StoresFp32 => WeightFormat == WeightFormat.Float32;

    /// <summary>Of an element of a matrix, a key or a value.</summary>
    internal int StoredBytes => StoresFp32 ? sizeof(float) : sizeof(ushort);

    public override int StepsInFlight => 2;

    public override int StepTokens => 4096;

    protected internal override int EarlierAnswers => _answersBefore;

    protected override void DisposeCore()
    {
        Device.MakeCurrent();
        Device.Stream.Synchronize();
        _commands.Dispose();
        _place?.Dispose();
        _partials?.Dispose();
        _counters?.Dispose();
        _sampling?.Dispose();
        _apply.Dispose();
        _staging.Dispose();
        _stagedIndices.Dispose();
        _matMul.Dispose();
        _kernels.Dispose();
        Device.Dispose();
    }

    // ---- Memory.

    protected override Tensor AllocateTensorCore(int rows, int columns, bool rounded) =>
        new CudaTensor(this, rows, columns, rounded && !StoresFp32);

    protected override Weight AllocateWeightCore(int outputs, int inputs) => new CudaWeight(this, outputs, inputs);

    protected override WeightArena AllocateWeightsCore(IReadOnlyList<(int Outputs, int Inputs)> shapes) =>
        CudaWeightArena.Allocate(this, shapes);

    protected override KvCache AllocateKvCacheCore(int blocks, IReadOnlyList<KvLayout> layers)
    {
        foreach (KvLayout layer in layers)
        {
            if (layer.KeyDim != layer.ValueDim || layer.KeyDim > MostHeadDim)
            {
                throw new ArgumentOutOfRangeException(
                    nameof(layers), layer, $"Attention on a GPU is for keys and values of one width, at most {MostHeadDim}.");
            }

            _ = _kernels.Attend(layer.KeyDim, 1);
            _ = _kernels.Attend(layer.KeyDim, AttentionKernel.MostRowTiles(layer.KeyDim));
        }

        return new CudaKvCache(this, blocks, layers);
    }

    protected override RopeTable AllocateRopeTableCore(ReadOnlySpan<float> inverseFrequencies, int positions) =>
        new CudaRopeTable(this, inverseFrequencies, positions);

    /// <summary>
    /// What every algorithm that cuBLASLt proposes for a weight shape computes, and how fast: see <see cref="MatMulCandidate"/>. Nothing is
    /// chosen or stored.
    /// </summary>
    internal IReadOnlyList<MatMulCandidate> SurveyMatMul(int outputs, int inputs, MatMulOutput kind, ReadOnlySpan<int> rows)
    {
        ThrowIfDisposed();
        return _matMul.Survey(outputs, inputs, kind, rows);
    }

    // ---- One step.

    public override IEnumerable<StepLayout> Rehearsals(StepLayout room)
    {
        int sequences = Math.Min(room.RowStart.Length - 1, room.TokenIds.Length);
        // Without a shared chunk, and where the context is long enough also with one: attention has a kernel for each.
        int[] positions = room.MaxBlocks * KvCache.BlockTokens > CudaAttentionPlan.Chunk ? [0, CudaAttentionPlan.Chunk] : [0];
        for (int last = 0, rows = 1; last < sequences; last = rows, rows = Math.Min(Bucket(rows + 1), sequences))
        {
            foreach (int position in positions)
                yield return Rehearsal(room, rows, position);
        }
    }

    /// <summary>A step that decodes <paramref name="rows"/> sequences, all at the same position and with the same blocks.</summary>
    private static StepLayout Rehearsal(StepLayout room, int rows, int position)
    {
        int padded = Bucket(rows);
        StepLayout step = new(Math.Min(padded, room.TokenIds.Length), rows, room.MaxBlocks, Math.Min(padded, room.Queries.Length), 0, 0)
        {
            IsRehearsal = true,
            SequenceCount = rows,
            OutputCount = rows,
            QueryCount = rows,
        };
        for (int s = 0; s < rows; s++)
        {
            (step.RowStart[s + 1], step.Positions[s], step.OutputRows[s]) = (s + 1, position, s);
            step.Queries[s] = new SampleQuery { OutputIndex = s, Target = -1, Temperature = 1, TopP = 1 };
        }

        return step;
    }

    protected override void LeaveStepCore()
    {
        Device.MakeCurrent();
        Flush();
    }

    protected override void BeginStepCore(StepLayout step)
    {
        if (_place is null || !_place.Holds(step))
        {
            CudaStep larger = new(Device, step);
            _finishedEarly = _place is null ? null : larger.TakeOver(_place);
            _place = larger;
        }

        _isDecode = step.RowCount == step.SequenceCount;
        for (int s = 0; s < step.SequenceCount && _isDecode; s++)
            _isDecode = step.RowStart[s] == s;
        _plan.Build(step, _cut.RowsPerItem, _cut.Slots);
        _uploadedFor = _cut;
        int rows = Math.Min(Pad(step.RowCount), step.TokenIds.Length);
        int queries = Math.Min(Math.Max(step.QueryCount, Pad(step.RowCount)), step.Queries.Length);
        if (step.IsRehearsal)
        {
            _place.Place(rows, queries);
        }
        else
        {
            (_answersBefore, _answers) = (_answers, 0);
            _place.Upload(step, ++_stepsBegun, RowSequence, _plan, rows, queries);
        }
    }

    protected override void EmbedCore(Weight table, Tensor output)
    {
        (CudaWeight weight, CudaTensor tensor) = ((CudaWeight)table, (CudaTensor)output);
        Use(weight);
        Launch(_kernels.Embed, new Grid(Pad(Step.RowCount, tensor)), Threads,
            weight.Pointer, _place!.Tokens, _place.Results, tensor.Fp32, weight.Inputs);
        tensor.IsRounded = false;
    }

    protected override void RmsNormCore(Tensor input, Weight scale, float epsilon, Tensor output, int rows)
    {
        (CudaTensor source, CudaTensor destination) = ((CudaTensor)input, (CudaTensor)output);
        nuint scales = VectorOf(scale);
        rows = Pad(rows, source, destination);
        Launch(_kernels.RmsNorm, new Grid(rows), Threads, Fp32(source, rows), scales, epsilon, destination.Rounded, source.Columns);
        destination.IsRounded = true;
    }

    protected override void RmsNormAddCore(Tensor input, Weight scale, float epsilon, Tensor residual, int rows)
    {
        (CudaTensor source, CudaTensor destination) = ((CudaTensor)input, (CudaTensor)residual);
        nuint scales = VectorOf(scale);
        rows = Pad(rows, source, destination);
        Launch(_kernels.RmsNormAdd, new Grid(rows), Threads, Fp32(source, rows), scales, epsilon, Fp32(destination, rows), source.Columns);
    }

    protected override void MatMulCore(Tensor input, Weight weight, Weight? bias, Tensor output, int rows, bool add)
    {
        (CudaTensor source, CudaWeight matrix, CudaTensor destination) = ((CudaTensor)input, (CudaWeight)weight, (CudaTensor)output);
        nuint biases = VectorOf(bias);
        Use(matrix);
        Device.MakeCurrent();
        rows = Pad(rows, source, destination);
        bool rounds = destination.IsKeptRounded && !add && biases == 0; // cuBLASLt adds to bf16 no bias in fp32
        MatMulOutput kind = rounds ? MatMulOutput.Stored : add ? MatMulOutput.AddFp32 : MatMulOutput.Fp32;
        nuint sums = rounds ? destination.Rounded : add ? Fp32(destination, rows) : destination.Fp32, factors = Rounded(source, rows);
        _matMul.Prepare(matrix.Outputs, matrix.Inputs, kind); // the collected launches may be captured
        if (Notes)
            _commands.Multiply(factors, matrix.Pointer, biases, sums, rows, matrix.Outputs, matrix.Inputs, kind);
        else
            _matMul.Multiply(factors, matrix.Pointer, biases, sums, rows, matrix.Outputs, matrix.Inputs, kind);
        destination.IsRounded = rounds;
    }

    protected override void AttentionCore(in AttentionCall call)
    {
        StepLayout step = Step;
        CudaKvCache cache = (CudaKvCache)call.Cache;
        (CudaTensor qkv, CudaTensor output) = ((CudaTensor)call.Qkv, (CudaTensor)call.Output);
        KvLayout layout = cache.Layout(call.Layer);
        int heads = call.Heads, kvHeads = layout.KvHeads, headDim = layout.KeyDim;
        (nuint queryNorm, nuint keyNorm, nuint rope) =
            (VectorOf(call.QueryNorm), VectorOf(call.KeyNorm), ((CudaRopeTable)call.Rope).Pointer);
        (nuint keys, nuint values) = (cache.Keys(call.Layer), cache.Values(call.Layer));
        nuint rows = Fp32(qkv, step.RowCount);
        // The kernels below normalise head by head; a norm over all heads runs before them, and they get none.
        if (call.QueryNorm is not null && call.QueryNorm.Inputs != headDim)
        {
            NormColumns(qkv, 0, call.QueryNorm.Inputs, queryNorm, call.Epsilon);
            queryNorm = 0;
        }

        if (call.KeyNorm is not null && call.KeyNorm.Inputs != headDim)
        {
            NormColumns(qkv, heads * headDim, call.KeyNorm.Inputs, keyNorm, call.Epsilon);
            keyNorm = 0;
        }

        if (!_isDecode)
        {
            Launch(_kernels.RopeStore, new Grid(step.RowCount, heads + (2 * kvHeads)), WarpThreads,
                rows, qkv.Columns, heads, kvHeads, headDim, queryNorm, keyNorm, call.Epsilon, rope,
                _place!.Header, _place.Positions, _place.Sequences, KvCache.BlockTokens, keys, values);
            (queryNorm, keyNorm, rope) = (0, 0, 0); // done; in a step of single rows the attention kernel does it
        }

        int group = heads / kvHeads, queriesPerItem = AttentionKernel.MostRowTiles(headDim) * AttentionKernel.TileQueries;
        int slice = Math.Min(group, queriesPerItem), slices = (group + slice - 1) / slice;
        _cut = (queriesPerItem / slice, CudaAttentionPlan.SlotsFor(_place!.MostSequences, step.MaxBlocks, heads, headDim, MostPartBytes));
        if (_uploadedFor != _cut)
        {
            Flush(); // the collected launches use the previous plan
            _plan.Build(step, _cut.RowsPerItem, _cut.Slots);
            _place!.Upload(step, _plan);
            _uploadedFor = _cut;
        }

        Reserve(ref _partials, _cut.Slots * CudaAttentionPlan.PartBytes(heads, headDim));
        Reserve(ref _counters, (long)step.TokenIds.Length * kvHeads * slices * sizeof(uint));

        // The launch of a step that decodes depends on its number of rows alone, whatever their contexts: blocks take items until none is
        // left.
        AttentionKernel kernel = _kernels.Attend(headDim, _plan.RowTiles(slice, headDim));
        int blocks = _isDecode ? kernel.BlocksFor(Pad(step.RowCount) + _cut.Slots, kvHeads * slices) : _plan.ItemCount;
        Launch(kernel.Function, new Grid(blocks, kvHeads, slices), kernel.Threads, kernel.SharedBytes,
            [_place.Header, rows, qkv.Columns, _place.Positions, keys, values, heads, kvHeads, slice, call.Scale, output.Rounded,
            _place.RowSlots, _partials.Pointer, _counters.Pointer, queryNorm, keyNorm, rope == 0 ? 0f : call.Epsilon, rope]);
        output.IsRounded = true;
    }

    /// <summary>Normalises some columns of every row, in place.</summary>
    private void NormColumns(CudaTensor tensor, int first, int columns, nuint scales, float epsilon)
    {
        Launch(_kernels.RmsNormColumns, new Grid(Pad(Step.RowCount, tensor)), Threads,
            tensor.Fp32 + ((nuint)first * sizeof(float)), tensor.Columns, scales, epsilon, columns);
    }

    protected override void GatedSiluCore(Tensor gateUp, Tensor output, int rows)
    {
        (CudaTensor source, CudaTensor destination) = ((CudaTensor)gateUp, (CudaTensor)output);
        rows = Pad(rows, source, destination);
        Launch(_kernels.GatedSilu, new Grid(rows, Blocks(destination.Columns, 16 / StoredBytes).X), Threads,
            Rounded(source, rows), destination.Rounded, destination.Columns);
        destination.IsRounded = true;
    }

    protected override void GatherRowsCore(Tensor input, int first, int count, Tensor output)
    {
        (CudaTensor source, CudaTensor destination) = ((CudaTensor)input, (CudaTensor)output);
        count = Math.Min(Pad(count, destination), Step.TokenIds.Length - first);
        Launch(_kernels.Gather, new Grid(count), Threads,
            Fp32(source, Step.RowCount), _place!.OutputRows + (nuint)(first * sizeof(int)), destination.Fp32, source.Columns);
        destination.IsRounded = false;
    }

    protected override void SampleCore(Tensor logits, int first, int count, int begin, int end)
    {
        CudaTensor source = (CudaTensor)logits;
        CudaSampleScratch scratch = new(source.Columns);
        Reserve(ref _sampling, scratch.Bytes);
        nuint values = Fp32(source, count), counters = _sampling.Pointer;
        int queries = Pad(end - begin);
        for (int done = 0; done < queries; done += CudaSampleScratch.MostQueries)
        {
            Launch(_kernels.Sample, new Grid(Math.Min(queries - done, CudaSampleScratch.MostQueries), scratch.Slices), Threads,
                _place!.Header, values, source.Columns, source.Columns, _place.Queries, begin + done,
                first, first + source.Rows, _place.Results,
                _place.AlternativeIds, _place.AlternativeLogProbs, counters,
                counters + (nuint)CudaSampleScratch.Found, counters + (nuint)scratch.Tops);
        }

        if (first + count < Step.OutputCount)
            return; // the step is launched, and its answers fetched, once its last operation is collected
        Flush();
        if (Step.IsRehearsal)
            return;
        _place!.Download();
        _answers = Step.QueryCount;
    }

    protected override void FinishStepCore(StepLayout step)
    {
        Device.MakeCurrent();
        if (_finishedEarly == step)
        {
            _finishedEarly = null;
            return;
        }

        long ordinal = _place?.Finish(step) ?? 0;
        if (ordinal == 0)
            throw new InvalidOperationException("This step is not in flight.");
        if (step.OutputCount > 0) // without outputs, only its upload was waited for, and the device may still run it
            Interlocked.Exchange(ref _stepsDone, ordinal);
    }

    protected override void CopyBlockCore(KvCache cache, int from, int to)
    {
        CudaKvCache keysValues = (CudaKvCache)cache;
        Flush();
        Device.MakeCurrent();
        for (int layer = 0; layer < cache.Layers; layer++)
        {
            nuint bytes = (nuint)keysValues.BlockBytes(layer);
            foreach (nuint half in (ReadOnlySpan<nuint>)[keysValues.Keys(layer), keysValues.Values(layer)])
            {
                Driver.cuMemcpyDtoDAsync_v2(half + ((nuint)to * bytes), half + ((nuint)from * bytes), bytes, Device.Stream.Value)
                    .ThrowIfFailed((long)bytes);
            }
        }
    }

    // ---- Launches.

    /// <summary>Blocks for this many elements, of which a thread handles `each`.</summary>
    private static Grid Blocks(long count, int each = 1) => new((int)((count + ((long)Threads * each) - 1) / ((long)Threads * each)));

    private void Launch(nint function, Grid grid, int threads, params ReadOnlySpan<Argument> arguments) =>
        Launch(function, grid, threads, sharedBytes: 0, arguments);

    private void Launch(nint function, Grid grid, int threads, int sharedBytes, ReadOnlySpan<Argument> arguments)
    {
        if (grid.X == 0)
            return;
        if (Notes)
        {
            _commands.Launch(function, grid, threads, sharedBytes, arguments);
            return;
        }

        Device.MakeCurrent();
        _kernels.Launch(function, Device.Stream, grid, threads, sharedBytes, arguments);
    }

    /// <summary>
    /// Whether launches are collected and sent together at the end of the step. For a step without answers nothing would send them.
    /// </summary>
    private bool Notes => StepOrNull is { OutputCount: > 0 };

    /// <summary>Launches what was collected, or in a rehearsal records it as a graph for later steps that are equal.</summary>
    internal void Flush()
    {
        if (StepOrNull is { IsRehearsal: true })
            _commands.Record();
        else
            _commands.Send();
    }

    /// <summary>Drops the graphs that use these addresses, because their memory is about to be freed.</summary>
    internal void Forget(nuint start, long bytes) => _commands.Forget(start, bytes);

    /// <summary>
    /// Rows to run over in a step that decodes: rounded up to one of few numbers, so that steps are equal and can be launched as graphs.
    /// The results of rows past the step's are unused, and change no bit of the others.
    /// </summary>
    private int Pad(int rows) => !_isDecode || rows <= 0 ? rows : Bucket(rows);

    /// <summary>The next power of two, or above 8 also the number halfway between two powers.</summary>
    private static int Bucket(int rows)
    {
        int above = (int)BitOperations.RoundUpToPowerOf2((uint)rows);
        return above > 8 && rows <= above / 4 * 3 ? above / 4 * 3 : above;
    }

    private int Pad(int rows, Tensor tensor) => Math.Min(Pad(rows), tensor.Rows);

    private int Pad(int rows, Tensor one, Tensor other) => Math.Min(Pad(rows, one), other.Rows);

    /// <summary>A zeroed buffer, allocated once for a model.</summary>
    private void Reserve([NotNull] ref DeviceBuffer? buffer, long bytes)
    {
        if (bytes <= buffer?.Bytes)
            return;
        Flush(); // collected launches may use the old one
        buffer?.Dispose();
        buffer = Device.AllocateZeroed(bytes);
    }

    private void Use(CudaWeight weight) => weight.LastStep = _stepsBegun;

    private nuint VectorOf(Weight? vector)
    {
        if (vector is not CudaWeight own)
            return 0;
        Use(own);
        return own.Pointer;
    }
}
