using System.Diagnostics.CodeAnalysis;
using System.Numerics;
using System.Runtime.CompilerServices;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// The operations on an NVIDIA GPU. Weights, keys, values and what goes into a matmul are bf16, or all of it fp32; sums and the residual stream are
/// fp32 either way. A step is queued operation by operation and waited for once, when its answers are read back: by then the next may be queued.
/// </summary>
public sealed unsafe partial class CudaBackend : IBackend
{
    private const int Threads = 256;        // a block of all kernels but attention and rope
    private const int WarpThreads = 32;
    private const int StagingBytes = 8 << 20;

    private readonly CudaKernels _kernels;
    private readonly CudaMatMul _matMul;
    private readonly CudaCommands _commands;
    private readonly CudaAttentionPlan _plan = new();
    private readonly DeviceBuffer _staging, _stagedIndices; // of weights on their way in
    private DeviceBuffer? _partials, _counters;             // of attention that is cut by chunks
    private DeviceBuffer? _sampling;                        // see CudaSampleScratch
    private CudaStep? _place;
    private StepLayout? _step;
    private int[] _rowSequence = [];
    private Rope? _rope;
    private bool _isDecode; // every sequence of the step has one row
    private (int RowsPerItem, int Slots) _cut = (1, 0); // how the last attention's model cuts steps
    private (int RowsPerItem, int Slots) _uploadedFor;
    private ContextChecks _contextChecks;
    private long _stepsBegun;
    private long _stepsDone;
    private int _answers, _answersBefore; // queries of this step and of the one before that the device has answered, or will have
    private StepLayout? _finishedEarly;
    private bool _disposed;

    /// <param name="ordinal">Which GPU.</param>
    /// <param name="format">bf16, or fp32.</param>
    /// <exception cref="CudaException">A library or the device is missing, or cannot be used; says what.</exception>
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
        Name = $"cuda:{ordinal} {Device.Name}, {WeightFormats.NameOf(format)}";
    }

    public string Name { get; }

    /// <summary>GPUs that could be used now; 0 where the driver or a library is missing.</summary>
    public static int DeviceCount => CudaDevice.Count;

    /// <summary>Why no GPU could be used now, in one sentence; null where one could.</summary>
    public static string? WhyNoDevice => CudaDevice.WhyNone;

    public WeightFormat WeightFormat { get; }

    public int WriteRows => 1;

    public long AvailableBytes => Device.FreeBytes;

    public long HeldBytes => Device.UsedBytes;

    public int KvElementBytes => StoredBytes;

    /// <summary>As many as most steps that decode have, so that they read the head once: 311 MB for a vocabulary of 151,936.</summary>
    public int LogitRows => 512;

    /// <summary>Half of what is free: the trainer may share the device, and a staged update takes a second set of weights.</summary>
    public long KvCacheBudget => Device.FreeBytes / 2;

    /// <summary>Steps, or parts of steps, that went to the device as one graph.</summary>
    public long GraphLaunches => _commands.GraphLaunches;

    /// <summary>Most memory that parts of long contexts take: see <see cref="CudaAttentionPlan"/>. Bits do not depend on it.</summary>
    internal long MostPartBytes { get; init; } = 128 << 20;

    internal CudaDevice Device { get; }

    internal bool StoresFp32 => WeightFormat == WeightFormat.Float32;

    /// <summary>Of an element of a matrix, a key or a value.</summary>
    internal int StoredBytes => StoresFp32 ? sizeof(float) : sizeof(ushort);

    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        _rope = null;
        Device.MakeCurrent();
        Device.Stream.Synchronize();
        _commands.Dispose();
        _place?.Dispose();
        _partials?.Dispose();
        _counters?.Dispose();
        _sampling?.Dispose();
        _staging.Dispose();
        _stagedIndices.Dispose();
        _matMul.Dispose();
        _kernels.Dispose();
        Device.Dispose();
    }

    // ---- Memory.

    public Tensor AllocateTensor(int rows, int columns, bool rounded = false)
    {
        ThrowIfDisposed();
        ArgumentOutOfRangeException.ThrowIfLessThan(rows, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(columns, 1);
        return new CudaTensor(this, rows, columns, rounded && !StoresFp32);
    }

    public Weight AllocateWeight(int outputs, int inputs)
    {
        ThrowIfDisposed();
        ArgumentOutOfRangeException.ThrowIfLessThan(outputs, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(inputs, 1);
        return new CudaWeight(this, outputs, inputs);
    }

    public WeightArena AllocateWeights(IReadOnlyList<(int Outputs, int Inputs)> shapes)
    {
        ThrowIfDisposed();
        foreach ((int outputs, int inputs) in shapes)
        {
            ArgumentOutOfRangeException.ThrowIfLessThan(outputs, 1);
            ArgumentOutOfRangeException.ThrowIfLessThan(inputs, 1);
        }

        return CudaWeightArena.Allocate(this, shapes);
    }

    public KvCache AllocateKvCache(int layers, int blocks, int kvHeads, int headDim)
    {
        ThrowIfDisposed();
        ArgumentOutOfRangeException.ThrowIfLessThan(layers, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(blocks, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(kvHeads, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(headDim, 2);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(headDim, 256);
        if (headDim % 2 != 0)
            throw new ArgumentException("Rotation pairs the halves of a head, so its dimension is even.", nameof(headDim));
        _ = _kernels.Attend(headDim, 1);
        _ = _kernels.Attend(headDim, AttentionKernel.MostRowTiles(headDim));
        return new CudaKvCache(this, layers, blocks, kvHeads, headDim);
    }

    public RopeTable AllocateRopeTable(ReadOnlySpan<float> inverseFrequencies, int positions, float scale)
    {
        ThrowIfDisposed();
        if (inverseFrequencies.IsEmpty)
            throw new ArgumentException("No frequencies.", nameof(inverseFrequencies));
        ArgumentOutOfRangeException.ThrowIfLessThan(positions, 1);
        return new CudaRopeTable(this, inverseFrequencies, positions, scale);
    }

    /// <summary>
    /// What every algorithm that cuBLASLt proposes for a weight shape computes, and how fast: see <see cref="MatMulCandidate"/>. Nothing is chosen or kept.
    /// </summary>
    internal IReadOnlyList<MatMulCandidate> SurveyMatMul(int outputs, int inputs, MatMulOutput kind, ReadOnlySpan<int> rows)
    {
        ThrowIfDisposed();
        return _matMul.Survey(outputs, inputs, kind, rows);
    }

    // ---- One step.

    public int StepsUnderWay => 2;

    public int StepTokens => 4096;

    public IEnumerable<StepLayout> Rehearsals(StepLayout room)
    {
        int sequences = Math.Min(room.RowStart.Length - 1, room.TokenIds.Length);
        // Alone, and where the context is long enough for a shared chunk also sharing one: attention has a kernel for each.
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

    public void BeginStep(StepLayout step)
    {
        ThrowIfDisposed();
        ArgumentNullException.ThrowIfNull(step);
        Device.MakeCurrent();
        Flush();
        (_step, _contextChecks) = (null, default);
        if (_rowSequence.Length < step.TokenIds.Length)
            _rowSequence = new int[step.TokenIds.Length];
        Checks.Step(step, _rowSequence);
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
            _place.Upload(step, ++_stepsBegun, _rowSequence, _plan, rows, queries);
        }

        _step = step;
    }

    public void Embed(Weight table, Tensor output)
    {
        StepLayout step = Step();
        CudaWeight weight = OwnMatrix(table);
        CudaTensor tensor = Own(output, step.RowCount, weight.Inputs);
        Checks.Tokens(step, weight, _answersBefore);
        Use(weight);
        Launch(_kernels.Embed, new Grid(Pad(step.RowCount, tensor)), Threads,
            weight.Pointer, _place!.Tokens, _place.Results, tensor.Fp32, weight.Inputs);
        tensor.IsRounded = false;
    }

    public void RmsNorm(Tensor input, Weight scale, float epsilon, Tensor output, int rows)
    {
        ThrowIfDisposed();
        CudaTensor source = Own(input, rows);
        CudaTensor destination = Own(output, rows, source.Columns);
        nuint scales = OwnVector(scale, source.Columns).Pointer;
        rows = Pad(rows, source, destination);
        Launch(_kernels.RmsNorm, new Grid(rows), Threads, Fp32(source, rows), scales, epsilon, destination.Rounded, source.Columns);
        destination.IsRounded = true;
    }

    public void MatMul(Tensor input, Weight weight, Weight? bias, Tensor output, int rows)
    {
        CudaWeight matrix = OwnMatrix(weight);
        Multiply(Own(input, rows, matrix.Inputs), matrix, bias, Own(output, rows, matrix.Outputs), rows, add: false);
    }

    public void MatMulAdd(Tensor input, Weight weight, Weight? bias, Tensor residual, int rows)
    {
        CudaWeight matrix = OwnMatrix(weight);
        Multiply(Own(input, rows, matrix.Inputs), matrix, bias, Own(residual, rows, matrix.Outputs), rows, add: true);
    }

    public void RopeStoreKv(
        Tensor qkv, int heads, Weight? queryNorm, Weight? keyNorm, float epsilon, RopeTable rope, KvCache cache, int layer)
    {
        StepLayout step = Step();
        CudaKvCache keysValues = Own(cache);
        Checks.Heads(heads, keysValues);
        Checks.Layer(layer, keysValues);
        int headDim = keysValues.HeadDim, allHeads = heads + (2 * keysValues.KvHeads);
        CudaTensor tensor = Own(qkv, step.RowCount, allHeads * headDim);
        CudaRopeTable table = this.Own<CudaRopeTable>(rope);
        _contextChecks.Check(step, table, keysValues);
        _ = Fp32(tensor, step.RowCount);
        _rope = new Rope(
            tensor, heads, queryNorm is null ? 0 : OwnVector(queryNorm, headDim).Pointer, keyNorm is null ? 0 : OwnVector(keyNorm, headDim).Pointer,
            epsilon, table.Pointer, keysValues, layer);
        if (!_isDecode)
            StoreKv();
    }

    /// <summary>A rotation that has been asked for and not done: in a step of single rows attention does it on its way.</summary>
    private readonly record struct Rope(
        CudaTensor Qkv, int Heads, nuint QueryNorm, nuint KeyNorm, float Epsilon, nuint Table, CudaKvCache Cache, int Layer);

    /// <summary>Does it by itself, where something else is asked for than the attention that would.</summary>
    private void StoreKv()
    {
        if (_rope is not { } rope)
            return;
        _rope = null;
        int allHeads = rope.Heads + (2 * rope.Cache.KvHeads);
        Launch(_kernels.RopeStore, new Grid(_step!.RowCount, allHeads), WarpThreads,
            rope.Qkv.Fp32, rope.Qkv.Columns, rope.Heads, rope.Cache.KvHeads, rope.Cache.HeadDim, rope.QueryNorm, rope.KeyNorm, rope.Epsilon, rope.Table,
            _place!.Header, _place.Positions, _place.Sequences, KvCache.BlockTokens, rope.Cache.Keys(rope.Layer), rope.Cache.Values(rope.Layer));
    }

    public void Attend(Tensor qkv, int heads, float scale, KvCache cache, int layer, Tensor output)
    {
        StepLayout step = Step();
        CudaKvCache keysValues = Own(cache);
        Checks.Heads(heads, keysValues);
        Checks.Layer(layer, keysValues);
        CudaTensor queries = Own(qkv, step.RowCount);
        int headDim = keysValues.HeadDim;
        if (queries.Columns < heads * headDim)
            throw new ArgumentException($"{queries.Columns} columns, needed at least {heads * headDim}.", nameof(qkv));
        CudaTensor destination = Own(output, step.RowCount, heads * headDim);
        _contextChecks.Check(step, keysValues);

        int group = heads / keysValues.KvHeads, queriesPerItem = AttentionKernel.MostRowTiles(headDim) * AttentionKernel.TileQueries;
        int slice = Math.Min(group, queriesPerItem), slices = (group + slice - 1) / slice;
        _cut = (queriesPerItem / slice, CudaAttentionPlan.SlotsFor(_place!.MostSequences, step.MaxBlocks, heads, headDim, MostPartBytes));
        if (_uploadedFor != _cut)
        {
            _plan.Build(step, _cut.RowsPerItem, _cut.Slots);
            _place!.Upload(step, _plan);
            _uploadedFor = _cut;
        }

        Rope? rope = _rope is { } asked && (asked.Qkv, asked.Heads, asked.Cache, asked.Layer) == (queries, heads, keysValues, layer) ? asked : null;
        if (rope is not null)
            _rope = null;
        Reserve(ref _partials, _cut.Slots * CudaAttentionPlan.PartBytes(heads, headDim));
        Reserve(ref _counters, (long)step.TokenIds.Length * keysValues.KvHeads * slices * sizeof(uint));

        // A step that decodes is launched by its number of rows alone, whatever their contexts: blocks take items until there are none.
        AttentionKernel kernel = _kernels.Attend(headDim, _plan.RowTiles(slice, headDim));
        int blocks = _isDecode ? kernel.BlocksFor(Pad(step.RowCount) + _cut.Slots, keysValues.KvHeads * slices) : _plan.ItemCount;
        Launch(kernel.Function, new Grid(blocks, keysValues.KvHeads, slices), kernel.Threads, kernel.SharedBytes,
            [_place.Header, Fp32(queries, step.RowCount), queries.Columns, _place.Positions,
            keysValues.Keys(layer), keysValues.Values(layer), heads, keysValues.KvHeads, slice, scale, destination.Rounded, _place.RowSlots,
            _partials.Pointer, _counters.Pointer, rope?.QueryNorm ?? 0, rope?.KeyNorm ?? 0, rope?.Epsilon ?? 0, rope?.Table ?? 0]);
        destination.IsRounded = true;
    }

    public void GatedSilu(Tensor gateUp, Tensor output, int rows)
    {
        ThrowIfDisposed();
        CudaTensor destination = Own(output, rows);
        CudaTensor source = Own(gateUp, rows, 2 * destination.Columns);
        rows = Pad(rows, source, destination);
        Launch(_kernels.GatedSilu, new Grid(rows, Blocks(destination.Columns, 16 / StoredBytes).X), Threads,
            Rounded(source, rows), destination.Rounded, destination.Columns);
        destination.IsRounded = true;
    }

    public void GatherRows(Tensor input, int first, int count, Tensor output)
    {
        StepLayout step = Step();
        Checks.Outputs(step, first, count);
        CudaTensor source = Own(input, step.RowCount);
        CudaTensor destination = Own(output, count, source.Columns);
        count = Math.Min(Pad(count, destination), step.TokenIds.Length - first);
        Launch(_kernels.Gather, new Grid(count), Threads,
            Fp32(source, step.RowCount), _place!.OutputRows + (nuint)(first * sizeof(int)), destination.Fp32, source.Columns);
        destination.IsRounded = false;
    }

    public void Sample(Tensor logits, int first, int count)
    {
        StepLayout step = Step();
        Checks.Outputs(step, first, count);
        CudaTensor source = Own(logits, count);
        (int begin, int end) = Checks.Queries(step, first, count, source.Columns);
        CudaSampleScratch scratch = new(source.Columns);
        Reserve(ref _sampling, scratch.Bytes);
        nuint values = Fp32(source, count), counters = _sampling.Pointer;
        int queries = Pad(end - begin);
        for (int done = 0; done < queries; done += CudaSampleScratch.MostQueries)
        {
            Launch(_kernels.Sample, new Grid(Math.Min(queries - done, CudaSampleScratch.MostQueries), scratch.Slices), Threads,
                _place!.Header, values, source.Columns, source.Columns, _place.Queries, begin + done, first, first + source.Rows, _place.Results,
                _place.AlternativeIds, _place.AlternativeLogProbs, counters, counters + (nuint)CudaSampleScratch.Found, counters + (nuint)scratch.Tops);
        }

        if (first + count < step.OutputCount)
            return; // with the last of the step's answers come all
        Flush();
        if (step.IsRehearsal)
        {
            _step = null;
            return;
        }

        _place!.Download();
        _answers = step.QueryCount;
    }

    public void FinishStep(StepLayout step)
    {
        ThrowIfDisposed();
        ArgumentNullException.ThrowIfNull(step);
        Device.MakeCurrent();
        if (_finishedEarly == step)
        {
            _finishedEarly = null;
            return;
        }

        long ordinal = _place?.Finish(step) ?? 0;
        if (ordinal == 0)
            throw new InvalidOperationException("This step is not under way.");
        if (step.OutputCount > 0) // else it was waited for until it was sent, and the device may be at it
            Interlocked.Exchange(ref _stepsDone, ordinal);
    }

    public void CopyBlock(KvCache cache, int from, int to)
    {
        ThrowIfDisposed();
        CudaKvCache keysValues = Own(cache);
        Checks.Blocks(cache, from, to);
        Flush();
        Device.MakeCurrent();
        nuint source = (nuint)(from * keysValues.BlockBytes), destination = (nuint)(to * keysValues.BlockBytes);
        for (int layer = 0; layer < cache.Layers; layer++)
        {
            foreach (nuint half in (ReadOnlySpan<nuint>)[keysValues.Keys(layer), keysValues.Values(layer)])
            {
                Driver.cuMemcpyDtoDAsync_v2(half + destination, half + source, (nuint)keysValues.BlockBytes, Device.Stream.Value)
                    .ThrowIfFailed(keysValues.BlockBytes);
            }
        }
    }

    // ---- The two forms of a tensor.

    /// <summary>A tensor's values to the host.</summary>
    internal void Read(CudaTensor tensor, int rows, Span<float> destination)
    {
        Flush();
        Device.MakeCurrent();
        CopyOut(tensor.IsRounded ? tensor.Rounded : tensor.Fp32, !tensor.IsRounded || StoresFp32, destination[..(rows * tensor.Columns)], Device.Stream);
    }

    private nuint Fp32(CudaTensor tensor, int rows)
    {
        if (tensor.IsRounded && !StoresFp32)
        {
            long count = (long)rows * tensor.Columns;
            Launch(_kernels.Widen, Blocks(count, 4), Threads, tensor.Rounded, tensor.Fp32, count);
        }

        tensor.IsRounded = false;
        return tensor.Fp32;
    }

    private nuint Rounded(CudaTensor tensor, int rows)
    {
        if (!tensor.IsRounded && !StoresFp32)
        {
            // The fp32 values stay the tensor's: whoever rounds them again later gets the same.
            long count = (long)rows * tensor.Columns;
            Launch(_kernels.Round, Blocks(count, 4), Threads, tensor.Fp32, tensor.Rounded, count);
        }

        return tensor.Rounded;
    }

    private void Multiply(CudaTensor input, CudaWeight weight, Weight? bias, CudaTensor output, int rows, bool add)
    {
        ThrowIfDisposed();
        if (ReferenceEquals(input, output))
            throw new ArgumentException("Input and output are the same tensor.", nameof(input));
        nuint biases = bias is null ? 0 : OwnVector(bias, weight.Outputs).Pointer;
        if (rows == 0)
            return;
        StoreKv();
        Use(weight);
        Device.MakeCurrent();
        rows = Pad(rows, input, output);
        bool rounds = output.IsKeptRounded && !add && biases == 0; // cuBLASLt adds to bf16 no bias in fp32
        MatMulOutput kind = rounds ? MatMulOutput.Stored : add ? MatMulOutput.AddFp32 : MatMulOutput.Fp32;
        nuint sums = rounds ? output.Rounded : add ? Fp32(output, rows) : output.Fp32, factors = Rounded(input, rows);
        _matMul.Prepare(weight.Outputs, weight.Inputs, kind); // what is noted may be captured
        if (Notes)
            _commands.Multiply(factors, weight.Pointer, biases, sums, rows, weight.Outputs, weight.Inputs, kind);
        else
            _matMul.Multiply(factors, weight.Pointer, biases, sums, rows, weight.Outputs, weight.Inputs, kind);
        output.IsRounded = rounds;
    }

    // ---- Launches.

    /// <summary>For so many elements, of which a thread takes `each`.</summary>
    private static Grid Blocks(long count, int each = 1) => new((int)((count + ((long)Threads * each) - 1) / ((long)Threads * each)));

    private void Launch(nint function, Grid grid, int threads, params ReadOnlySpan<Argument> arguments) =>
        Launch(function, grid, threads, sharedBytes: 0, arguments);

    private void Launch(nint function, Grid grid, int threads, int sharedBytes, ReadOnlySpan<Argument> arguments)
    {
        StoreKv();
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

    /// <summary>Whether launches wait for the step's answers to be asked for. Of a step without answers nobody would ever send them.</summary>
    private bool Notes => _step is { OutputCount: > 0 };

    /// <summary>Sends what was noted, or in a rehearsal keeps it for the steps that will be like this one.</summary>
    internal void Flush()
    {
        StoreKv();
        if (_step is { IsRehearsal: true })
            _commands.Record();
        else
            _commands.Send();
    }

    /// <summary>Gives up the graphs that use these addresses, because their memory is about to go.</summary>
    internal void Forget(nuint start, long bytes) => _commands.Forget(start, bytes);

    /// <summary>
    /// Rows to run over, in a step that decodes: one of few numbers, so that steps are alike and go as graphs. Rows past the step's are computed for
    /// nothing, and change no bit of the others.
    /// </summary>
    private int Pad(int rows) => !_isDecode || rows <= 0 ? rows : Bucket(rows);

    /// <summary>The next power of two, or from 8 up what lies half-way to it.</summary>
    private static int Bucket(int rows)
    {
        int above = (int)BitOperations.RoundUpToPowerOf2((uint)rows);
        return above > 8 && rows <= above / 4 * 3 ? above / 4 * 3 : above;
    }

    private int Pad(int rows, Tensor tensor) => Math.Min(Pad(rows), tensor.Rows);

    private int Pad(int rows, Tensor one, Tensor other) => Math.Min(Pad(rows, one), other.Rows);

    /// <summary>Zeroed room, taken once for a model.</summary>
    private void Reserve([NotNull] ref DeviceBuffer? buffer, long bytes)
    {
        if (bytes <= buffer?.Bytes)
            return;
        Flush(); // what was noted may name the old one
        buffer?.Dispose();
        buffer = Device.AllocateZeroed(bytes);
    }

    private void Use(CudaWeight weight) => weight.LastStep = _stepsBegun;

    // ---- Memory is ours.

    private void ThrowIfDisposed() => ObjectDisposedException.ThrowIf(_disposed, this);

    private StepLayout Step()
    {
        ThrowIfDisposed();
        return _step ?? throw new InvalidOperationException($"{nameof(BeginStep)} comes first.");
    }

    private CudaTensor Own(Tensor tensor, int rows, int columns = 0, [CallerArgumentExpression(nameof(tensor))] string? name = null) =>
        this.Own<CudaTensor>(tensor, rows, columns, name);

    private CudaWeight Own(Weight weight, [CallerArgumentExpression(nameof(weight))] string? name = null)
    {
        ThrowIfDisposed();
        return this.Own<CudaWeight>(weight, name);
    }

    private CudaWeight OwnMatrix(Weight weight, [CallerArgumentExpression(nameof(weight))] string? name = null)
    {
        ThrowIfDisposed();
        return this.OwnMatrix<CudaWeight>(weight, name);
    }

    private CudaWeight OwnVector(Weight weight, int length, [CallerArgumentExpression(nameof(weight))] string? name = null)
    {
        CudaWeight own = this.OwnVector<CudaWeight>(weight, length, name);
        Use(own);
        return own;
    }

    private CudaKvCache Own(KvCache cache, [CallerArgumentExpression(nameof(cache))] string? name = null) => this.Own<CudaKvCache>(cache, name);
}
