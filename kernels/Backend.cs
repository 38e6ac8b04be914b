namespace Rollout.Kernels;

/// <summary>
/// The arithmetic of one transformer step on one device: a set of operations, called in order by one thread. The public operations check
/// their arguments, once and in the same way for every device, and call the device's core. A new operation is a public method and a core
/// here, and a core in each device.
/// <para>
/// What every backend promises, and the abstract test suite checks: results are within a stated tolerance of a float64 reference; <b>a
/// row's result is bit-identical whatever other rows the step holds</b> (every reduction runs in an order fixed by the row alone: ascending
/// input index in a matmul, blocks of <see cref="KvCache.BlockTokens"/> tokens from position 0 in attention); the same inputs give the same
/// bits twice; nothing managed is allocated per call after start-up; wrong shapes are refused with an <see cref="ArgumentException"/>
/// naming the parameter.
/// </para>
/// <para>Notation: rows = tokens of the step, hidden, heads = query heads, kvHeads, headDim, vocab.</para>
/// </summary>
public abstract partial class Backend : IDisposable
{
    private StepLayout? _step;
    private ContextChecks _context;
    private volatile bool _disposed;

    /// <summary>Device and code path, for people: "cpu avx512, 2 threads".</summary>
    public abstract string Name { get; }

    /// <summary>How matrices are stored.</summary>
    public abstract WeightFormat WeightFormat { get; }

    /// <summary>Bytes that can still be allocated on the device.</summary>
    public abstract long AvailableBytes { get; }

    /// <summary>Bytes of the device that this process holds, as the system counts them.</summary>
    public abstract long HeldBytes { get; }

    /// <summary>Bytes of one element of a key or a value.</summary>
    public abstract int KvElementBytes { get; }

    /// <summary>Most bytes to allocate for keys and values when the operator does not say.</summary>
    public abstract long KvCacheBudget { get; }

    /// <summary>
    /// Output rows whose logits are computed together. Each such batch reads the whole head and needs [rows, vocabulary] fp32 of memory.
    /// </summary>
    public abstract int LogitRows { get; }

    /// <summary><see cref="WriteWeight"/> is fastest for multiples of this many outputs.</summary>
    public abstract int WriteRows { get; }

    /// <summary>
    /// Steps that may be in flight: 1, or 2 where the device works concurrently with the host. Then tokens of the second may be answers of
    /// the first: see <see cref="StepLayout.TokenIds"/>.
    /// </summary>
    public abstract int StepsInFlight { get; }

    /// <summary>Memory of other processes on the same GPU; null on a CPU.</summary>
    public virtual Cuda.CudaPeers? Peers => null;

    /// <summary>Tokens of a step when the operator does not say: enough to fill the device.</summary>
    public virtual int StepTokens => 512;

    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        DisposeCore();
        GC.SuppressFinalize(this);
    }

    // ---- Memory: allocated at start, never in a step.

    /// <param name="rows">Capacity.</param>
    /// <param name="columns">Of a row.</param>
    /// <param name="rounded">
    /// Whether its readers take values in the type that matrices are stored in: a GPU then keeps the tensor in that type, in half the
    /// bytes, and rounds each written value once. A CPU keeps every tensor in fp32.
    /// </param>
    public Tensor AllocateTensor(int rows, int columns, bool rounded = false)
    {
        ThrowIfDisposed();
        ArgumentOutOfRangeException.ThrowIfLessThan(rows, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(columns, 1);
        return AllocateTensorCore(rows, columns, rounded);
    }

    public Weight AllocateWeight(int outputs, int inputs)
    {
        ThrowIfDisposed();
        ArgumentOutOfRangeException.ThrowIfLessThan(outputs, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(inputs, 1);
        return AllocateWeightCore(outputs, inputs);
    }

    /// <summary>
    /// All weights of a model. On a GPU they have one range of addresses, which stays the same when the memory is discarded and restored.
    /// </summary>
    /// <exception cref="OutOfMemoryException">The device does not have enough memory; nothing stays allocated.</exception>
    public WeightArena AllocateWeights(IReadOnlyList<(int Outputs, int Inputs)> shapes)
    {
        ThrowIfDisposed();
        foreach ((int outputs, int inputs) in shapes)
        {
            ArgumentOutOfRangeException.ThrowIfLessThan(outputs, 1);
            ArgumentOutOfRangeException.ThrowIfLessThan(inputs, 1);
        }

        return AllocateWeightsCore(shapes);
    }

    /// <param name="blocks">Blocks of <see cref="KvCache.BlockTokens"/> tokens.</param>
    /// <param name="layers">Shape of each layer's keys and values.</param>
    public KvCache AllocateKvCache(int blocks, params IReadOnlyList<KvLayout> layers)
    {
        ThrowIfDisposed();
        ArgumentOutOfRangeException.ThrowIfLessThan(blocks, 1);
        ArgumentOutOfRangeException.ThrowIfZero(layers.Count, nameof(layers));
        foreach (KvLayout layer in layers)
        {
            if (layer.KvHeads < 1 || layer.KeyDim < 2 || layer.KeyDim % 2 != 0 || layer.ValueDim < 1)
            {
                throw new ArgumentOutOfRangeException(
                    nameof(layers), layer, "Needed: a head, and an even key width, whose halves rotation pairs.");
            }
        }

        return AllocateKvCacheCore(blocks, layers);
    }

    /// <summary>
    /// Tabulates cos and sin of (float)position * inverseFrequencies[i], the product rounded to fp32 as PyTorch models do it.
    /// </summary>
    public RopeTable AllocateRopeTable(ReadOnlySpan<float> inverseFrequencies, int positions)
    {
        ThrowIfDisposed();
        if (inverseFrequencies.IsEmpty)
            throw new ArgumentException("No frequencies.", nameof(inverseFrequencies));
        ArgumentOutOfRangeException.ThrowIfLessThan(positions, 1);
        return AllocateRopeTableCore(inverseFrequencies, positions);
    }

    // ---- Weights: from any thread, also while a step runs on other weights, and concurrently for disjoint elements.

    /// <summary>
    /// Stores part of a checkpoint tensor: <paramref name="source"/> holds whole rows of a matrix [outputs, inputs] or elements of a
    /// vector, the first being element <paramref name="element"/> (= output * inputs + input) of <paramref name="destination"/>. Rounds to
    /// nearest even.
    /// </summary>
    public void WriteWeight(Weight destination, long element, ReadOnlySpan<byte> source, DType type)
    {
        ThrowIfDisposed();
        Own(destination);
        Checks.Write(destination, element, source, type);
        WriteWeightCore(destination, element, source, type);
    }

    /// <summary>
    /// Stores single elements: value i becomes element <paramref name="element"/> + indices[i]. The result is exactly that of writing the
    /// whole weight, which is why an int8 backend refuses it for matrices.
    /// </summary>
    public void WriteWeightElements(Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type)
    {
        ThrowIfDisposed();
        Own(destination);
        Checks.WriteElements(destination, element, indices, values, type);
        WriteWeightElementsCore(destination, element, indices, values, type);
    }

    /// <summary>
    /// Makes <paramref name="destination"/> bit-equal to <paramref name="source"/>. May be called while a step reads the source.
    /// </summary>
    public void CopyWeight(Weight source, Weight destination)
    {
        ThrowIfDisposed();
        Own(source);
        Own(destination);
        Checks.SameShape(source, destination);
        CopyWeightCore(source, destination);
    }

    /// <summary>Reads elements back as fp32 (exact: storage is never wider), from any element on.</summary>
    public void ReadWeight(Weight source, long element, Span<float> destination)
    {
        ThrowIfDisposed();
        Own(source);
        Checks.Elements(source, element, destination.Length, nameof(destination));
        ReadWeightCore(source, element, destination);
    }

    // ---- One step.

    /// <summary>
    /// Steps to run once, up to <see cref="Sample"/>, with every set of weights before its first real step. Nothing is computed, but what
    /// such steps need besides memory is prepared, so that no later step has to do it. A GPU captures its graphs here.
    /// </summary>
    /// <param name="room">A layout as large as that of the later steps.</param>
    public virtual IEnumerable<StepLayout> Rehearsals(StepLayout room) => [];

    /// <summary>Uploads the step's indices. Every later call of the step refers to them.</summary>
    public void BeginStep(StepLayout step)
    {
        ThrowIfDisposed();
        ArgumentNullException.ThrowIfNull(step);
        LeaveStepCore();
        (_step, _context) = (null, default);
        if (RowSequence.Length < step.TokenIds.Length)
            RowSequence = new int[step.TokenIds.Length];
        Checks.Step(step, RowSequence);
        BeginStepCore(step);
        _step = step;
    }

    /// <summary>output[row] = table[TokenIds[row]].</summary>
    public void Embed(Weight table, Tensor output)
    {
        StepLayout step = Step;
        OwnMatrix(table);
        Own(output, step.RowCount, table.Inputs);
        Checks.Tokens(step, table, EarlierAnswers);
        EmbedCore(table, output);
    }

    /// <summary>output[row] = input[row] / sqrt(mean(input[row]²) + epsilon) * scale, for the first <paramref name="rows"/> rows.</summary>
    public void RmsNorm(Tensor input, Weight scale, float epsilon, Tensor output, int rows)
    {
        ThrowIfDisposed();
        Own(input, rows);
        Own(output, rows, input.Columns);
        OwnVector(scale, input.Columns);
        RmsNormCore(input, scale, epsilon, output, rows);
    }

    /// <summary>
    /// residual[row] += the norm of input[row] as <see cref="RmsNorm"/> has it, for the first <paramref name="rows"/> rows. What
    /// <paramref name="input"/> holds afterwards is undefined.
    /// </summary>
    public void RmsNormAdd(Tensor input, Weight scale, float epsilon, Tensor residual, int rows)
    {
        ThrowIfDisposed();
        Own(input, rows);
        Own(residual, rows, input.Columns);
        OwnVector(scale, input.Columns);
        Checks.Differ(input, residual);
        RmsNormAddCore(input, scale, epsilon, residual, rows);
    }

    /// <summary>
    /// output[row, o] = sum_i input[row, i] * weight[o, i] (+ bias[o]), one chain of fused multiply-adds over ascending i; with int8
    /// weights exact sums of 128 inputs at a time, and one such chain over them.
    /// </summary>
    public void MatMul(Tensor input, Weight weight, Weight? bias, Tensor output, int rows)
    {
        CheckMatMul(input, weight, bias, rows);
        Own(output, rows, weight.Outputs);
        Checks.Differ(input, output);
        if (rows > 0)
            MatMulCore(input, weight, bias, output, rows, add: false);
    }

    /// <summary>residual[row, o] += the same sum as <see cref="MatMul"/>.</summary>
    public void MatMulAdd(Tensor input, Weight weight, Weight? bias, Tensor residual, int rows)
    {
        CheckMatMul(input, weight, bias, rows);
        Own(residual, rows, weight.Outputs);
        Checks.Differ(input, residual);
        if (rows > 0)
            MatMulCore(input, weight, bias, residual, rows, add: true);
    }

    /// <summary>
    /// Norms and rotates queries and keys, stores keys and values in the cache, and attends, causally: see <see cref="AttentionCall"/>.
    /// Scores and softmax are fp32.
    /// </summary>
    public void Attention(in AttentionCall call)
    {
        StepLayout step = Step;
        Own(call.Cache);
        Checks.Layer(call.Layer, call.Cache);
        KvLayout layout = call.Cache.Layout(call.Layer);
        Checks.Heads(call.Heads, layout);
        Own(call.Qkv, step.RowCount, (call.Heads * layout.KeyDim) + (layout.KvHeads * (layout.KeyDim + layout.ValueDim)));
        Own(call.Output, step.RowCount, call.Heads * layout.ValueDim);
        Own(call.Rope);
        OwnHeadNorm(call.QueryNorm, layout.KeyDim, call.Heads);
        OwnHeadNorm(call.KeyNorm, layout.KeyDim, layout.KvHeads);
        Checks.RopeWidth(call.Rope, layout);
        Checks.Differ(call.Qkv, call.Output);
        _context.Check(step, call);
        AttentionCore(call);
    }

    /// <summary>output[row, i] = silu(gateUp[row, i]) * gateUp[row, width + i]; gateUp is [rows, 2*width].</summary>
    public void GatedSilu(Tensor gateUp, Tensor output, int rows)
    {
        ThrowIfDisposed();
        Own(output, rows);
        Own(gateUp, rows, 2 * output.Columns);
        GatedSiluCore(gateUp, output, rows);
    }

    /// <summary>output[k] = input[OutputRows[first + k]] for k in [0, count).</summary>
    public void GatherRows(Tensor input, int first, int count, Tensor output)
    {
        StepLayout step = Step;
        Checks.Outputs(step, first, count);
        Own(input, step.RowCount);
        Own(output, count, input.Columns);
        GatherRowsCore(input, first, count, output);
    }

    /// <summary>
    /// Answers every <see cref="SampleQuery"/> of the step whose OutputIndex is in [first, first + count), logits[k] being the logits of
    /// output row first + k, [count, vocab]. The answers are available after <see cref="FinishStep"/>. Logits may be overwritten. How a
    /// token is chosen, and what the log-probabilities mean, is defined in protos/rollout/v1/DEFINITIONS.md.
    /// </summary>
    public void Sample(Tensor logits, int first, int count)
    {
        StepLayout step = Step;
        Checks.Outputs(step, first, count);
        Own(logits, count);
        (int begin, int end) = Checks.Queries(step, first, count, logits.Columns);
        SampleCore(logits, first, count, begin, end);
        if (step.IsRehearsal && first + count == step.OutputCount)
            _step = null;
    }

    /// <summary>
    /// Waits for the answers of <see cref="Sample"/>: from here on <see cref="StepLayout.Results"/> and the alternatives hold them. Steps
    /// end in the order in which they began.
    /// </summary>
    public void FinishStep(StepLayout step)
    {
        ThrowIfDisposed();
        ArgumentNullException.ThrowIfNull(step);
        FinishStepCore(step);
    }

    /// <summary>Copies whole blocks (all layers, keys and values) inside a cache; used when samples of a group diverge.</summary>
    public void CopyBlock(KvCache cache, int from, int to)
    {
        ThrowIfDisposed();
        Own(cache);
        Checks.Blocks(cache, from, to);
        CopyBlockCore(cache, from, to);
    }
}
