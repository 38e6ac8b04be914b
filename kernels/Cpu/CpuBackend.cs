using System.Runtime.Intrinsics;

namespace Rollout.Kernels;

/// <summary>
/// The operations on the CPU: bfloat16 or int8 weights in panels, fp32 everywhere else. The same inputs give the same bits with any number
/// of threads, any vector width, and on any CPU, since every kernel fixes its order of operations and uses its own exp and log.
/// </summary>
public sealed unsafe class CpuBackend : Backend
{
    /// <summary>Elements below which waking the other threads costs more than it saves.</summary>
    private const long SmallWork = 8192;

    private readonly Workers _workers;
    private readonly NormJob _norm;
    private readonly NormJob _normAdd;
    private readonly GatedSiluJob _gatedSilu;
    private readonly RopeJob _rope;
    private readonly AttentionJob _attention;
    private readonly SampleJob _sample;
    private readonly EmbedJob _embed = new();
    private readonly AttentionTiles _tiles = new();
    private NativeBuffer _packed = new(1 << 20);
    private int _tiledFor;

    /// <param name="threads">Threads, the calling one included; 0 uses all cores.</param>
    /// <param name="vectorBits">512, 256 or 128 forces a code path, 0 uses the widest that the machine runs well.</param>
    /// <param name="format">How matrices are stored, and so what a matmul computes in.</param>
    public CpuBackend(int threads = 0, int vectorBits = 0, WeightFormat format = WeightFormat.BFloat16)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(threads);
        if (threads == 0)
            threads = Environment.ProcessorCount;
        if (vectorBits == 0)
            vectorBits = Vector512.IsHardwareAccelerated ? 512 : Vector256.IsHardwareAccelerated ? 256 : 128;

        switch (vectorBits)
        {
            case 512:
                (_norm, _normAdd, _gatedSilu, _rope, _attention, _sample) = Lanes<Lanes512>();
                break;
            case 256:
                (_norm, _normAdd, _gatedSilu, _rope, _attention, _sample) = Lanes<Lanes256>();
                break;
            case 128:
                (_norm, _normAdd, _gatedSilu, _rope, _attention, _sample) = Lanes<Lanes128>();
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(vectorBits), vectorBits, "512, 256, 128, or 0 for the widest.");
        }

        WeightFormat = format;
        Matrices = Matrices.Of(format, vectorBits);
        string matrices = Matrices.Description.Length > 0 ? $", {Matrices.Description}" : "";
        _workers = new Workers(threads);
        Name = $"cpu {vectorBits}-bit vectors, {threads} {(threads == 1 ? "thread" : "threads")}{matrices}";

        static (NormJob Norm, NormJob NormAdd, GatedSiluJob Silu, RopeJob Rope, AttentionJob Attention, SampleJob Sample) Lanes<TLanes>()
            where TLanes : unmanaged, ILanes<TLanes> =>
            (new NormJob<TLanes>(), new NormAddJob<TLanes>(), new GatedSiluJob<TLanes>(), new RopeJob<TLanes>(), new AttentionJob<TLanes>(),
                new SampleJob<TLanes>());
    }

    public override string Name { get; }

    public override WeightFormat WeightFormat { get; }

    internal Matrices Matrices { get; }

    public override int WriteRows => PanelLayout.Width;

    public override long AvailableBytes => MachineMemory.AvailableBytes();

    public override long HeldBytes => MachineMemory.HeldBytes();

    public override int KvElementBytes => sizeof(float);

    /// <summary>39 MB for a vocabulary of 151,936; enough rows to keep a matmul efficient.</summary>
    public override int LogitRows => 64;

    /// <summary>A quarter of the machine's memory.</summary>
    public override long KvCacheBudget => GC.GetGCMemoryInfo().TotalAvailableMemoryBytes / 4;

    /// <summary>Whether the machine has vectors this wide; narrower ones are then included. 128 bits always work.</summary>
    public static bool IsAccelerated(int vectorBits) => vectorBits switch
    {
        512 => Vector512.IsHardwareAccelerated,
        256 => Vector256.IsHardwareAccelerated,
        _ => true,
    };

    public override int StepsInFlight => 1;

    protected override void DisposeCore()
    {
        _workers.Dispose();
        _attention.Dispose();
        _sample.Dispose();
        Matrices.Dispose();
        _packed.Dispose();
    }

    // ---- Memory.

    protected override Tensor AllocateTensorCore(int rows, int columns, bool rounded)
    {
        // A matmul's input is at most this large: scratch to pack it is allocated now, not in a step.
        long bytes = Matrices.PackedBytes(rows, columns);
        if (bytes > _packed.Bytes)
        {
            _packed.Dispose();
            _packed = new NativeBuffer(bytes);
        }

        return new CpuTensor(this, rows, columns);
    }

    protected override Weight AllocateWeightCore(int outputs, int inputs) => new CpuWeight(this, outputs, inputs);

    protected override KvCache AllocateKvCacheCore(int blocks, IReadOnlyList<KvLayout> layers)
    {
        foreach (KvLayout layer in layers)
        {
            if (Math.Max(layer.KeyDim, layer.ValueDim) > AttentionJob.MostHeadDim)
                throw new ArgumentOutOfRangeException(nameof(layers), layer, $"Heads have at most {AttentionJob.MostHeadDim} elements.");
        }

        _attention.Reserve(_workers.Count, AttentionJob.TileQueries);
        return new CpuKvCache(this, blocks, layers);
    }

    protected override RopeTable AllocateRopeTableCore(ReadOnlySpan<float> inverseFrequencies, int positions) =>
        new CpuRopeTable(this, inverseFrequencies, positions);

    // ---- Weights.

    protected override void WriteWeightCore(Weight destination, long element, ReadOnlySpan<byte> source, DType type)
    {
        CpuWeight weight = (CpuWeight)destination;
        int count = source.Length / type.Size();
        fixed (byte* bytes = source)
        {
            if (weight.IsVector)
            {
                for (int i = 0; i < count; i++)
                    weight.Vector[element + i] = PanelLayout.ToSingle(bytes, i, type);
                return;
            }

            Matrices.Write(weight.Data, weight.Outputs, weight.Inputs, (int)(element / weight.Inputs), bytes, count / weight.Inputs, type);
        }
    }

    protected override void WriteWeightElementsCore(
        Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type)
    {
        CpuWeight weight = (CpuWeight)destination;
        fixed (byte* bytes = values)
        {
            for (int i = 0; i < indices.Length; i++)
            {
                long at = element + indices[i];
                if (weight.IsVector)
                    weight.Vector[at] = PanelLayout.ToSingle(bytes, i, type);
                else
                    Matrices.WriteElement(weight.Data, weight.Inputs, at, bytes + ((long)i * type.Size()), type);
            }
        }
    }

    protected override void CopyWeightCore(Weight source, Weight destination)
    {
        (CpuWeight from, CpuWeight to) = ((CpuWeight)source, (CpuWeight)destination);
        Buffer.MemoryCopy(from.Data, to.Data, to.Bytes, from.Bytes);
    }

    protected override void ReadWeightCore(Weight source, long element, Span<float> destination)
    {
        CpuWeight weight = (CpuWeight)source;
        if (weight.IsVector)
            new ReadOnlySpan<float>(weight.Vector + element, destination.Length).CopyTo(destination);
        else
            Matrices.Read(weight.Data, weight.Outputs, weight.Inputs, element, destination);
    }

    // ---- One step.

    protected override void BeginStepCore(StepLayout step) => _tiledFor = 0;

    protected override void EmbedCore(Weight table, Tensor output)
    {
        CpuWeight weight = (CpuWeight)table;
        _embed.Step = Step;
        _embed.Table = weight;
        _embed.Output = (CpuTensor)output;
        _workers.Run(_embed, Step.RowCount, (long)Step.RowCount * weight.Inputs > SmallWork);
    }

    protected override void RmsNormCore(Tensor input, Weight scale, float epsilon, Tensor output, int rows) =>
        Run(_norm, input, scale, epsilon, output, rows);

    protected override void RmsNormAddCore(Tensor input, Weight scale, float epsilon, Tensor residual, int rows) =>
        Run(_normAdd, input, scale, epsilon, residual, rows);

    private void Run(NormJob job, Tensor input, Weight scale, float epsilon, Tensor output, int rows)
    {
        (CpuTensor source, CpuTensor destination) = ((CpuTensor)input, (CpuTensor)output);
        job.Input = source.Data;
        job.InputStride = source.Stride;
        job.Scale = ((CpuWeight)scale).Vector;
        job.Epsilon = epsilon;
        job.Output = destination.Data;
        job.OutputStride = destination.Stride;
        job.Columns = source.Columns;
        _workers.Run(job, rows, (long)rows * source.Columns > SmallWork);
    }

    protected override void MatMulCore(Tensor input, Weight weight, Weight? bias, Tensor output, int rows, bool add)
    {
        (CpuTensor source, CpuWeight matrix, CpuTensor sums) = ((CpuTensor)input, (CpuWeight)weight, (CpuTensor)output);
        MatMulArguments arguments;
        arguments.Input = source.Data;
        arguments.InputStride = source.Stride;
        arguments.Rows = rows;
        arguments.Matrix = matrix.Data;
        arguments.Outputs = matrix.Outputs;
        arguments.Inputs = matrix.Inputs;
        arguments.Bias = VectorOf(bias);
        arguments.Output = sums.Data;
        arguments.OutputStride = sums.Stride;
        arguments.Add = add;
        Matrices.Multiply(_workers, arguments, _packed.Pointer);
    }

    protected override void AttentionCore(in AttentionCall call)
    {
        CpuKvLayer cache = ((CpuKvCache)call.Cache).Layer(call.Layer);
        StoreKeysAndValues(call, cache);
        Attend(call, cache);
    }

    private void StoreKeysAndValues(in AttentionCall call, CpuKvLayer cache)
    {
        StepLayout step = Step;
        CpuTensor qkv = (CpuTensor)call.Qkv;
        _rope.Qkv = qkv.Data;
        _rope.Stride = qkv.Stride;
        _rope.Heads = call.Heads;
        _rope.QueryNorm = VectorOf(call.QueryNorm);
        _rope.KeyNorm = VectorOf(call.KeyNorm);
        _rope.QueryNormLength = call.QueryNorm?.Inputs ?? 0;
        _rope.KeyNormLength = call.KeyNorm?.Inputs ?? 0;
        _rope.Epsilon = call.Epsilon;
        _rope.Rope = (CpuRopeTable)call.Rope;
        _rope.Cache = cache;
        _rope.Step = step;
        _rope.RowSequence = RowSequence;
        int units = (step.RowCount + RopeJob.RowsPerUnit - 1) / RopeJob.RowsPerUnit;
        _workers.Run(_rope, units, (long)step.RowCount * qkv.Columns > SmallWork);
    }

    private void Attend(in AttentionCall call, CpuKvLayer cache)
    {
        (CpuTensor qkv, CpuTensor output) = ((CpuTensor)call.Qkv, (CpuTensor)call.Output);
        int group = call.Heads / cache.KvHeads;
        if (_tiledFor != group)
        {
            _tiles.Build(Step, RowSequence, Math.Max(1, AttentionJob.TileQueries / group));
            _tiledFor = group;
        }

        _attention.Reserve(_workers.Count, group);
        _attention.Qkv = qkv.Data;
        _attention.Stride = qkv.Stride;
        _attention.Group = group;
        _attention.Scale = call.Scale;
        _attention.Cache = cache;
        _attention.Output = output.Data;
        _attention.OutputStride = output.Stride;
        _attention.Step = Step;
        _attention.RowSequence = RowSequence;
        _attention.Tiles = _tiles;
        _workers.Run(_attention, _attention.Units);
    }

    protected override void GatedSiluCore(Tensor gateUp, Tensor output, int rows)
    {
        (CpuTensor source, CpuTensor destination) = ((CpuTensor)gateUp, (CpuTensor)output);
        _gatedSilu.Input = source.Data;
        _gatedSilu.InputStride = source.Stride;
        _gatedSilu.Output = destination.Data;
        _gatedSilu.OutputStride = destination.Stride;
        _gatedSilu.Width = destination.Columns;
        _workers.Run(_gatedSilu, rows, (long)rows * source.Columns > SmallWork);
    }

    protected override void GatherRowsCore(Tensor input, int first, int count, Tensor output)
    {
        (CpuTensor source, CpuTensor destination) = ((CpuTensor)input, (CpuTensor)output);
        for (int k = 0; k < count; k++)
        {
            new ReadOnlySpan<float>(source.Row(Step.OutputRows[first + k]), source.Columns)
                .CopyTo(new Span<float>(destination.Row(k), source.Columns));
        }
    }

    protected override void SampleCore(Tensor logits, int first, int count, int begin, int end)
    {
        CpuTensor source = (CpuTensor)logits;
        _sample.Reserve(_workers.Count, source.Columns);
        _sample.Logits = source.Data;
        _sample.Stride = source.Stride;
        _sample.Vocabulary = source.Columns;
        _sample.Step = Step;
        _sample.FirstOutput = first;
        _sample.FirstQuery = begin;
        _workers.Run(_sample, end - begin);
    }

    /// <summary>Nothing to wait for: the answers are ready when Sample returns.</summary>
    protected override void FinishStepCore(StepLayout step)
    {
    }

    protected override void CopyBlockCore(KvCache cache, int from, int to)
    {
        for (int layer = 0; layer < cache.Layers; layer++)
        {
            CpuKvLayer kv = ((CpuKvCache)cache).Layer(layer);
            long bytes = (long)kv.KvHeads * kv.TileFloats * sizeof(float);
            Buffer.MemoryCopy(kv.Keys(from, 0), kv.Keys(to, 0), bytes, bytes);
        }
    }

    private static float* VectorOf(Weight? vector) => vector is null ? null : ((CpuWeight)vector).Vector;

    /// <summary>output[row] = table[TokenIds[row]]. Units: rows.</summary>
    private sealed class EmbedJob : Job
    {
        public StepLayout Step = null!;
        public CpuWeight Table = null!;
        public CpuTensor Output = null!;

        public override void Execute(int unit, int worker) =>
            Table.Owner.Matrices.ReadRow(
                Table.Data, Table.Outputs, Table.Inputs, Step.TokenIds[unit], 0, Table.Inputs, Output.Row(unit));
    }
}
