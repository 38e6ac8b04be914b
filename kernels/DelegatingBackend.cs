namespace Rollout.Kernels;

/// <summary>
/// A backend that passes every operation on to another: derive from it to observe or alter single operations. Memory belongs to the inner
/// one.
/// </summary>
/// <param name="inner">Does the work; disposed with this.</param>
public abstract class DelegatingBackend(Backend inner) : Backend
{
    public override string Name => inner.Name;

    public override WeightFormat WeightFormat => inner.WeightFormat;

    public override long AvailableBytes => inner.AvailableBytes;

    public override long HeldBytes => inner.HeldBytes;

    public override int KvElementBytes => inner.KvElementBytes;

    public override long KvCacheBudget => inner.KvCacheBudget;

    public override int LogitRows => inner.LogitRows;

    public override int WriteRows => inner.WriteRows;

    public override int StepsInFlight => inner.StepsInFlight;

    public override int StepTokens => inner.StepTokens;

    public override Cuda.CudaPeers? Peers => inner.Peers;

    public override IEnumerable<StepLayout> Rehearsals(StepLayout room) => inner.Rehearsals(room);

    protected override void DisposeCore() => inner.Dispose();

    protected override Tensor AllocateTensorCore(int rows, int columns, bool rounded) => inner.AllocateTensor(rows, columns, rounded);

    protected override Weight AllocateWeightCore(int outputs, int inputs) => inner.AllocateWeight(outputs, inputs);

    protected override WeightArena AllocateWeightsCore(IReadOnlyList<(int Outputs, int Inputs)> shapes) => inner.AllocateWeights(shapes);

    protected override KvCache AllocateKvCacheCore(int blocks, IReadOnlyList<KvLayout> layers) => inner.AllocateKvCache(blocks, layers);

    protected override RopeTable AllocateRopeTableCore(ReadOnlySpan<float> inverseFrequencies, int positions) =>
        inner.AllocateRopeTable(inverseFrequencies, positions);

    protected override void WriteWeightCore(Weight destination, long element, ReadOnlySpan<byte> source, DType type) =>
        inner.WriteWeight(destination, element, source, type);

    protected override void WriteWeightElementsCore(
        Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type) =>
        inner.WriteWeightElements(destination, element, indices, values, type);

    protected override void CopyWeightCore(Weight source, Weight destination) => inner.CopyWeight(source, destination);

    protected override void ReadWeightCore(Weight source, long element, Span<float> destination) =>
        inner.ReadWeight(source, element, destination);

    protected override void BeginStepCore(StepLayout step) => inner.BeginStep(step);

    protected override void EmbedCore(Weight table, Tensor output) => inner.Embed(table, output);

    protected override void RmsNormCore(Tensor input, Weight scale, float epsilon, Tensor output, int rows) =>
        inner.RmsNorm(input, scale, epsilon, output, rows);

    protected override void RmsNormAddCore(Tensor input, Weight scale, float epsilon, Tensor residual, int rows) =>
        inner.RmsNormAdd(input, scale, epsilon, residual, rows);

    protected override void MatMulCore(Tensor input, Weight weight, Weight? bias, Tensor output, int rows, bool add)
    {
        if (add)
            inner.MatMulAdd(input, weight, bias, output, rows);
        else
            inner.MatMul(input, weight, bias, output, rows);
    }

    protected override void AttentionCore(in AttentionCall call) => inner.Attention(call);

    protected override void GatedSiluCore(Tensor gateUp, Tensor output, int rows) => inner.GatedSilu(gateUp, output, rows);

    protected override void GatherRowsCore(Tensor input, int first, int count, Tensor output) =>
        inner.GatherRows(input, first, count, output);

    protected override void SampleCore(Tensor logits, int first, int count, int begin, int end) => inner.Sample(logits, first, count);

    protected override void FinishStepCore(StepLayout step) => inner.FinishStep(step);

    protected override void CopyBlockCore(KvCache cache, int from, int to) => inner.CopyBlock(cache, from, to);

    protected internal override int EarlierAnswers => inner.EarlierAnswers;

    internal override bool Owns(DeviceMemory memory) => inner.Owns(memory);
}
