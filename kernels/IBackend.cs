namespace Rollout.Kernels;

/// <summary>
/// The arithmetic of one transformer step on one device: a vocabulary of operations, called in order by one thread.
/// <para>
/// What every backend promises, and the abstract test suite checks:
/// results are within a stated tolerance of a float64 reference; <b>a row's result is bit-identical whatever other rows the step
/// holds</b> (every reduction runs in an order fixed by the row alone: ascending input index in a matmul, blocks of
/// <see cref="KvCache.BlockTokens"/> tokens from position 0 in attention); the same inputs give the same bits twice; nothing managed is
/// allocated per call once memory has been taken; wrong shapes are refused with an <see cref="ArgumentException"/> naming the parameter.
/// </para>
/// <para>Notation: rows = tokens of the step, hidden, heads = query heads, kvHeads, headDim, vocab. All activations are fp32.</para>
/// </summary>
public interface IBackend : IDisposable
{
    /// <summary>Device and code path, for people: "cpu avx512, 2 threads".</summary>
    string Name { get; }

    // ---- Memory: taken at start, never in a step.

    /// <summary>How matrices are stored.</summary>
    WeightFormat WeightFormat { get; }

    /// <summary>Bytes the device could still give.</summary>
    long AvailableBytes { get; }

    /// <summary>Bytes of one element of a key or a value.</summary>
    int KvElementBytes { get; }

    /// <summary>Most bytes to take for keys and values where the operator does not say.</summary>
    long KvCacheBudget { get; }

    /// <summary>Output rows to compute logits of at a time: every time the whole head is read, and they take [rows, vocabulary] fp32.</summary>
    int LogitRows { get; }

    /// <summary>Bytes of the device that this process holds, as the system counts them.</summary>
    long HeldBytes { get; }

    /// <param name="rows">Capacity.</param>
    /// <param name="columns">Of a row.</param>
    /// <param name="rounded">
    /// Whether its readers take values as matrices are stored: a GPU then keeps it so, in half the bytes, and rounds what is written to it once. A CPU keeps
    /// every tensor in fp32.
    /// </param>
    Tensor AllocateTensor(int rows, int columns, bool rounded = false);

    Weight AllocateWeight(int outputs, int inputs);

    /// <summary>All weights of a model: on a GPU one range of addresses, which stays when the memory is given back and taken again.</summary>
    /// <exception cref="OutOfMemoryException">The device has not got it; none is held.</exception>
    WeightArena AllocateWeights(IReadOnlyList<(int Outputs, int Inputs)> shapes)
    {
        List<Weight> weights = new(shapes.Count);
        try
        {
            foreach ((int outputs, int inputs) in shapes)
                weights.Add(AllocateWeight(outputs, inputs));
        }
        catch
        {
            weights.ForEach(weight => weight.Dispose());
            throw;
        }

        return new WeightArena(weights);
    }

    KvCache AllocateKvCache(int layers, int blocks, int kvHeads, int headDim);

    /// <summary>
    /// Tabulates cos and sin of (float)position * inverseFrequencies[i], the product rounded to fp32 as PyTorch models do it.
    /// <paramref name="scale"/> multiplies both (rope attention factor, 1 for most models).
    /// </summary>
    RopeTable AllocateRopeTable(ReadOnlySpan<float> inverseFrequencies, int positions, float scale);

    /// <summary>
    /// Stores part of a checkpoint tensor: <paramref name="source"/> holds whole rows of a matrix [outputs, inputs] or elements of a vector,
    /// the first being element <paramref name="element"/> (= output * inputs + input) of <paramref name="destination"/>. Rounds to nearest
    /// even. May be called from any thread, also while a step runs on other weights, and concurrently for disjoint elements.
    /// </summary>
    void WriteWeight(Weight destination, long element, ReadOnlySpan<byte> source, DType type);

    /// <summary>Outputs in the unit that <see cref="WriteWeight"/> stores fastest: write multiples.</summary>
    int WriteRows { get; }

    /// <summary>
    /// Stores single elements: value i becomes element <paramref name="element"/> + indices[i]. Exactly what a write of the whole would have
    /// made of it, which is why an int8 backend refuses it for matrices. May be called from any thread, and concurrently for disjoint elements.
    /// </summary>
    void WriteWeightElements(Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type);

    /// <summary>Makes <paramref name="destination"/> bit-equal to <paramref name="source"/>. May be called while a step reads the source.</summary>
    void CopyWeight(Weight source, Weight destination);

    /// <summary>Reads elements back as fp32 (exact: storage is never wider), from any element on.</summary>
    void ReadWeight(Weight source, long element, Span<float> destination);

    // ---- One step.

    /// <summary>
    /// Steps that may have begun and not been finished: 1, or, where the device works beside the host, 2. Then the tokens of the second may be answers of
    /// the first: see <see cref="StepLayout.TokenIds"/>.
    /// </summary>
    int StepsUnderWay { get; }

    /// <summary>Tokens of a step where the operator does not say: as many as fill the device.</summary>
    int StepTokens => 512;

    /// <summary>
    /// Steps to go through once, up to <see cref="Sample"/>, with every set of weights before its first real one: nothing is computed, but what steps like
    /// these need beside memory is prepared, so that no later one has to. A GPU captures its graphs here.
    /// </summary>
    /// <param name="room">Of the size of the steps to come.</param>
    IEnumerable<StepLayout> Rehearsals(StepLayout room) => [];

    /// <summary>Uploads the step's indices. Every later call of the step refers to them.</summary>
    void BeginStep(StepLayout step);

    /// <summary>output[row] = table[TokenIds[row]].</summary>
    void Embed(Weight table, Tensor output);

    /// <summary>output[row] = input[row] / sqrt(mean(input[row]²) + epsilon) * scale, for the first <paramref name="rows"/> rows.</summary>
    void RmsNorm(Tensor input, Weight scale, float epsilon, Tensor output, int rows);

    /// <summary>output[row, o] = sum_i input[row, i] * weight[o, i] (+ bias[o]), one chain of fused multiply-adds over ascending i; with int8
    /// weights exact sums of 128 inputs at a time, and one such chain over them.</summary>
    void MatMul(Tensor input, Weight weight, Weight? bias, Tensor output, int rows);

    /// <summary>residual[row, o] += the same sum as <see cref="MatMul"/>.</summary>
    void MatMulAdd(Tensor input, Weight weight, Weight? bias, Tensor residual, int rows);

    /// <summary>
    /// Takes qkv rows [heads*headDim | kvHeads*headDim | kvHeads*headDim]; applies, where given, an RMS norm over each query and key head;
    /// rotates queries and keys by the row's position (halves paired: i with i + headDim/2); stores keys and values into the row's slot of
    /// <paramref name="cache"/>. What is left in <paramref name="qkv"/> is for <see cref="Attend"/> alone.
    /// </summary>
    void RopeStoreKv(Tensor qkv, int heads, Weight? queryNorm, Weight? keyNorm, float epsilon, RopeTable rope, KvCache cache, int layer);

    /// <summary>
    /// Causal attention of every row's queries (the first heads*headDim columns of <paramref name="qkv"/>) over positions 0..Positions[row]
    /// of its sequence's blocks, scores scaled by <paramref name="scale"/>, softmax in fp32. output: [rows, heads*headDim].
    /// </summary>
    void Attend(Tensor qkv, int heads, float scale, KvCache cache, int layer, Tensor output);

    /// <summary>output[row, i] = silu(gateUp[row, i]) * gateUp[row, width + i]; gateUp is [rows, 2*width].</summary>
    void GatedSilu(Tensor gateUp, Tensor output, int rows);

    /// <summary>output[k] = input[OutputRows[first + k]] for k in [0, count).</summary>
    void GatherRows(Tensor input, int first, int count, Tensor output);

    /// <summary>
    /// Answers every <see cref="SampleQuery"/> of the step whose OutputIndex lies in [first, first + count), logits[k] being the logits of
    /// output row first + k, [count, vocab]. The answers are there after <see cref="FinishStep"/>. Logits may be overwritten.
    /// How a token is chosen, and what the log-probabilities mean, is defined in protos/rollout/v1/DEFINITIONS.md.
    /// </summary>
    void Sample(Tensor logits, int first, int count);

    /// <summary>
    /// Waits for what <see cref="Sample"/> was asked: from here on <see cref="StepLayout.Results"/> and the alternatives hold it. Steps end in the order
    /// in which they began.
    /// </summary>
    void FinishStep(StepLayout step);

    /// <summary>Copies whole blocks (all layers, keys and values) inside a cache; used when samples of a group part ways.</summary>
    void CopyBlock(KvCache cache, int from, int to);
}
