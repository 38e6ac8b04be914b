using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace Rollout.Kernels;

/// <summary>
/// The operations on the CPU: bfloat16 or int8 weights in panels, fp32 everywhere else. The same inputs give the same bits with any number of
/// threads, any vector width, and on any CPU, since every kernel fixes its order of operations and brings its own exp and log.
/// </summary>
public sealed unsafe class CpuBackend : IBackend
{
    /// <summary>Elements below which waking the other threads costs more than it gives.</summary>
    private const long SmallWork = 8192;

    private readonly Workers _workers;
    private readonly NormJob _norm;
    private readonly GatedSiluJob _gatedSilu;
    private readonly RopeJob _rope;
    private readonly AttentionJob _attention;
    private readonly SampleJob _sample;
    private readonly EmbedJob _embed = new();
    private readonly AttentionTiles _tiles = new();
    private NativeBuffer _packed = new(1 << 20);
    private StepLayout? _step;
    private ContextChecks _contextChecks;
    private int[] _rowSequence = [];
    private int _tiledFor;
    private bool _disposed;

    /// <param name="threads">Threads, the calling one included; 0 takes all cores.</param>
    /// <param name="vectorBits">512, 256 or 128 forces a code path, 0 takes the widest that the machine runs well.</param>
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
                (_norm, _gatedSilu, _rope, _attention, _sample) = Lanes<Lanes512>();
                break;
            case 256:
                (_norm, _gatedSilu, _rope, _attention, _sample) = Lanes<Lanes256>();
                break;
            case 128:
                (_norm, _gatedSilu, _rope, _attention, _sample) = Lanes<Lanes128>();
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(vectorBits), vectorBits, "512, 256, 128, or 0 for the widest.");
        }

        WeightFormat = format;
        Matrices = Matrices.Of(format, vectorBits);
        string matrices = Matrices.Description.Length > 0 ? $", {Matrices.Description}" : "";
        _workers = new Workers(threads);
        Name = $"cpu {vectorBits}-bit vectors, {threads} {(threads == 1 ? "thread" : "threads")}{matrices}";

        static (NormJob Norm, GatedSiluJob GatedSilu, RopeJob Rope, AttentionJob Attention, SampleJob Sample) Lanes<TLanes>()
            where TLanes : unmanaged, ILanes<TLanes> =>
            (new NormJob<TLanes>(), new GatedSiluJob<TLanes>(), new RopeJob<TLanes>(), new AttentionJob<TLanes>(), new SampleJob<TLanes>());
    }

    public string Name { get; }

    public WeightFormat WeightFormat { get; }

    internal Matrices Matrices { get; }

    public int WriteRows => PanelLayout.Width;

    public long AvailableBytes => MachineMemory.AvailableBytes();

    public long HeldBytes => MachineMemory.HeldBytes();

    public int KvElementBytes => sizeof(float);

    /// <summary>39 MB for a vocabulary of 151,936; as many rows keep a matmul busy.</summary>
    public int LogitRows => 64;

    /// <summary>A quarter of the machine's memory.</summary>
    public long KvCacheBudget => GC.GetGCMemoryInfo().TotalAvailableMemoryBytes / 4;

    /// <summary>Whether the machine has vectors this wide; narrower ones are then part of them. 128 bits always run.</summary>
    public static bool IsAccelerated(int vectorBits) => vectorBits switch
    {
        512 => Vector512.IsHardwareAccelerated,
        256 => Vector256.IsHardwareAccelerated,
        _ => true,
    };

    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        _workers.Dispose();
        _attention.Dispose();
        _sample.Dispose();
        Matrices.Dispose();
        _packed.Dispose();
    }

    // ---- Memory.

    public Tensor AllocateTensor(int rows, int columns, bool rounded = false)
    {
        ThrowIfDisposed();
        ArgumentOutOfRangeException.ThrowIfLessThan(rows, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(columns, 1);

        // A matmul's input is at most this large: room to pack it is taken now, not in a step.
        long bytes = Matrices.PackedBytes(rows, columns);
        if (bytes > _packed.Bytes)
        {
            _packed.Dispose();
            _packed = new NativeBuffer(bytes);
        }

        return new CpuTensor(this, rows, columns);
    }

    public Weight AllocateWeight(int outputs, int inputs)
    {
        ThrowIfDisposed();
        ArgumentOutOfRangeException.ThrowIfLessThan(outputs, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(inputs, 1);
        return new CpuWeight(this, outputs, inputs);
    }

    public KvCache AllocateKvCache(int layers, int blocks, int kvHeads, int headDim)
    {
        ThrowIfDisposed();
        ArgumentOutOfRangeException.ThrowIfLessThan(layers, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(blocks, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(kvHeads, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(headDim, 2);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(headDim, AttentionJob.HeadStride - 16);
        if (headDim % 2 != 0)
            throw new ArgumentException("Rotation pairs the halves of a head, so its dimension is even.", nameof(headDim));
        _attention.Reserve(_workers.Count, AttentionJob.TileQueries);
        return new CpuKvCache(this, layers, blocks, kvHeads, headDim);
    }

    public RopeTable AllocateRopeTable(ReadOnlySpan<float> inverseFrequencies, int positions, float scale)
    {
        ThrowIfDisposed();
        if (inverseFrequencies.IsEmpty)
            throw new ArgumentException("No frequencies.", nameof(inverseFrequencies));
        ArgumentOutOfRangeException.ThrowIfLessThan(positions, 1);
        return new CpuRopeTable(this, inverseFrequencies, positions, scale);
    }

    public void WriteWeight(Weight destination, long element, ReadOnlySpan<byte> source, DType type)
    {
        CpuWeight weight = Own(destination);
        long count = Checks.Write(weight, element, source, type);
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

    public void WriteWeightElements(Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type)
    {
        CpuWeight weight = Own(destination);
        Checks.WriteElements(weight, element, indices, values, type);
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

    public void CopyWeight(Weight source, Weight destination)
    {
        CpuWeight from = Own(source);
        CpuWeight to = Own(destination);
        Checks.SameShape(from, to);
        Buffer.MemoryCopy(from.Data, to.Data, to.Bytes, from.Bytes);
    }

    public void ReadWeight(Weight source, long element, Span<float> destination)
    {
        CpuWeight weight = Own(source);
        Checks.Elements(weight, element, destination.Length, nameof(destination));
        if (weight.IsVector)
            new ReadOnlySpan<float>(weight.Vector + element, destination.Length).CopyTo(destination);
        else
            Matrices.Read(weight.Data, weight.Outputs, weight.Inputs, element, destination);
    }

    // ---- One step.

    public int StepsUnderWay => 1;

    public void BeginStep(StepLayout step)
    {
        ThrowIfDisposed();
        ArgumentNullException.ThrowIfNull(step);
        (_step, _contextChecks) = (null, default);
        if (_rowSequence.Length < step.TokenIds.Length)
            _rowSequence = new int[step.TokenIds.Length];

        Checks.Step(step, _rowSequence);
        _step = step;
        _tiledFor = 0;
    }

    public void Embed(Weight table, Tensor output)
    {
        StepLayout step = Step();
        CpuWeight weight = OwnMatrix(table);
        CpuTensor tensor = Own(output, step.RowCount, weight.Inputs);
        Checks.Tokens(step, weight);
        _embed.Step = step;
        _embed.Table = weight;
        _embed.Output = tensor;
        _workers.Run(_embed, step.RowCount, (long)step.RowCount * weight.Inputs > SmallWork);
    }

    public void RmsNorm(Tensor input, Weight scale, float epsilon, Tensor output, int rows)
    {
        ThrowIfDisposed();
        CpuTensor source = Own(input, rows);
        CpuTensor destination = Own(output, rows, source.Columns);
        _norm.Input = source.Data;
        _norm.InputStride = source.Stride;
        _norm.Scale = OwnVector(scale, source.Columns);
        _norm.Epsilon = epsilon;
        _norm.Output = destination.Data;
        _norm.OutputStride = destination.Stride;
        _norm.Columns = source.Columns;
        _workers.Run(_norm, rows, (long)rows * source.Columns > SmallWork);
    }

    public void MatMul(Tensor input, Weight weight, Weight? bias, Tensor output, int rows)
    {
        CpuWeight matrix = OwnMatrix(weight);
        Multiply(Own(input, rows, matrix.Inputs), matrix, bias, Own(output, rows, matrix.Outputs), rows, add: false);
    }

    public void MatMulAdd(Tensor input, Weight weight, Weight? bias, Tensor residual, int rows)
    {
        CpuWeight matrix = OwnMatrix(weight);
        Multiply(Own(input, rows, matrix.Inputs), matrix, bias, Own(residual, rows, matrix.Outputs), rows, add: true);
    }

    public void RopeStoreKv(
        Tensor qkv, int heads, Weight? queryNorm, Weight? keyNorm, float epsilon, RopeTable rope, KvCache cache, int layer)
    {
        StepLayout step = Step();
        CpuKvCache keysValues = Own(cache);
        Checks.Heads(heads, keysValues);
        Checks.Layer(layer, keysValues);
        CpuTensor tensor = Own(qkv, step.RowCount, (heads + (2 * keysValues.KvHeads)) * keysValues.HeadDim);
        CpuRopeTable table = Own(rope);
        _contextChecks.Check(step, table, keysValues);
        _rope.Qkv = tensor.Data;
        _rope.Stride = tensor.Stride;
        _rope.Heads = heads;
        _rope.QueryNorm = queryNorm == null ? null : OwnVector(queryNorm, keysValues.HeadDim);
        _rope.KeyNorm = keyNorm == null ? null : OwnVector(keyNorm, keysValues.HeadDim);
        _rope.Epsilon = epsilon;
        _rope.Rope = table;
        _rope.Cache = keysValues;
        _rope.Layer = layer;
        _rope.Step = step;
        _rope.RowSequence = _rowSequence;
        int units = (step.RowCount + RopeJob.RowsPerUnit - 1) / RopeJob.RowsPerUnit;
        _workers.Run(_rope, units, (long)step.RowCount * tensor.Columns > SmallWork);
    }

    public void Attend(Tensor qkv, int heads, float scale, KvCache cache, int layer, Tensor output)
    {
        StepLayout step = Step();
        CpuKvCache keysValues = Own(cache);
        Checks.Heads(heads, keysValues);
        Checks.Layer(layer, keysValues);
        CpuTensor queries = Own(qkv, step.RowCount);
        if (queries.Columns < heads * keysValues.HeadDim)
            throw new ArgumentException($"{queries.Columns} columns, needed at least {heads * keysValues.HeadDim}.", nameof(qkv));
        CpuTensor destination = Own(output, step.RowCount, heads * keysValues.HeadDim);
        _contextChecks.Check(step, keysValues);
        int group = heads / keysValues.KvHeads;
        if (_tiledFor != group)
        {
            _tiles.Build(step, _rowSequence, Math.Max(1, AttentionJob.TileQueries / group));
            _tiledFor = group;
        }

        _attention.Reserve(_workers.Count, group);
        _attention.Qkv = queries.Data;
        _attention.Stride = queries.Stride;
        _attention.Group = group;
        _attention.Scale = scale;
        _attention.Cache = keysValues;
        _attention.Layer = layer;
        _attention.Output = destination.Data;
        _attention.OutputStride = destination.Stride;
        _attention.Step = step;
        _attention.RowSequence = _rowSequence;
        _attention.Tiles = _tiles;
        _workers.Run(_attention, _attention.Units);
    }

    public void GatedSilu(Tensor gateUp, Tensor output, int rows)
    {
        ThrowIfDisposed();
        CpuTensor destination = Own(output, rows);
        CpuTensor source = Own(gateUp, rows, 2 * destination.Columns);
        _gatedSilu.Input = source.Data;
        _gatedSilu.InputStride = source.Stride;
        _gatedSilu.Output = destination.Data;
        _gatedSilu.OutputStride = destination.Stride;
        _gatedSilu.Width = destination.Columns;
        _workers.Run(_gatedSilu, rows, (long)rows * source.Columns > SmallWork);
    }

    public void GatherRows(Tensor input, int first, int count, Tensor output)
    {
        StepLayout step = Step();
        Checks.Outputs(step, first, count);
        CpuTensor source = Own(input, step.RowCount);
        CpuTensor destination = Own(output, count, source.Columns, nameof(output));
        for (int k = 0; k < count; k++)
        {
            new ReadOnlySpan<float>(source.Row(step.OutputRows[first + k]), source.Columns)
                .CopyTo(new Span<float>(destination.Row(k), source.Columns));
        }
    }

    public void Sample(Tensor logits, int first, int count)
    {
        StepLayout step = Step();
        Checks.Outputs(step, first, count);
        CpuTensor source = Own(logits, count);
        (int begin, int end) = Checks.Queries(step, first, count, source.Columns);
        _sample.Reserve(_workers.Count, source.Columns);
        _sample.Logits = source.Data;
        _sample.Stride = source.Stride;
        _sample.Vocabulary = source.Columns;
        _sample.Step = step;
        _sample.FirstOutput = first;
        _sample.FirstQuery = begin;
        _workers.Run(_sample, end - begin);
    }

    public void FinishStep(StepLayout step)
    {
        // Sample has answered when it returns.
        ThrowIfDisposed();
        ArgumentNullException.ThrowIfNull(step);
    }

    public void CopyBlock(KvCache cache, int from, int to)
    {
        ThrowIfDisposed();
        CpuKvCache keysValues = Own(cache);
        Checks.Blocks(cache, from, to);
        long bytes = (long)cache.KvHeads * keysValues.TileFloats * sizeof(float);
        for (int layer = 0; layer < cache.Layers; layer++)
            Buffer.MemoryCopy(keysValues.Keys(layer, from, 0), keysValues.Keys(layer, to, 0), bytes, bytes);
    }

    private void Multiply(CpuTensor input, CpuWeight weight, Weight? bias, CpuTensor output, int rows, bool add)
    {
        ThrowIfDisposed();
        if (ReferenceEquals(input, output))
            throw new ArgumentException("Input and output are the same tensor.", nameof(input));
        float* biasVector = bias == null ? null : OwnVector(bias, weight.Outputs);
        if (rows == 0)
            return;

        MatMulArguments arguments;
        arguments.Input = input.Data;
        arguments.InputStride = input.Stride;
        arguments.Rows = rows;
        arguments.Matrix = weight.Data;
        arguments.Outputs = weight.Outputs;
        arguments.Inputs = weight.Inputs;
        arguments.Bias = biasVector;
        arguments.Output = output.Data;
        arguments.OutputStride = output.Stride;
        arguments.Add = add;
        Matrices.Multiply(_workers, arguments, _packed.Pointer);
    }

    private void ThrowIfDisposed() => ObjectDisposedException.ThrowIf(_disposed, this);

    private StepLayout Step()
    {
        ThrowIfDisposed();
        return _step ?? throw new InvalidOperationException($"{nameof(BeginStep)} comes first.");
    }

    private CpuTensor Own(Tensor tensor, int rows, int columns = 0, [CallerArgumentExpression(nameof(tensor))] string? name = null) =>
        this.Own<CpuTensor>(tensor, rows, columns, name);

    private CpuWeight Own(Weight weight, [CallerArgumentExpression(nameof(weight))] string? name = null)
    {
        ThrowIfDisposed();
        return this.Own<CpuWeight>(weight, name);
    }

    private CpuWeight OwnMatrix(Weight weight, [CallerArgumentExpression(nameof(weight))] string? name = null)
    {
        ThrowIfDisposed();
        return this.OwnMatrix<CpuWeight>(weight, name);
    }

    private float* OwnVector(Weight weight, int length, [CallerArgumentExpression(nameof(weight))] string? name = null) =>
        this.OwnVector<CpuWeight>(weight, length, name).Vector;

    private CpuKvCache Own(KvCache cache, [CallerArgumentExpression(nameof(cache))] string? name = null) => this.Own<CpuKvCache>(cache, name);

    private CpuRopeTable Own(RopeTable rope, [CallerArgumentExpression(nameof(rope))] string? name = null) => this.Own<CpuRopeTable>(rope, name);

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
