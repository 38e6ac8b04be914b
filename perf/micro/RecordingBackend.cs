using System.Diagnostics;
using Rollout.Kernels;

namespace Rollout.Micro;

/// <summary>The parts of a step, as the transformer calls them; the host is everything between two calls of the backend.</summary>
internal enum Part
{
    Embed, Norms, Qkv, RopeStore, Attention, Output, GateUp, Silu, Down, Gather, Head, Sampling, Host,
}

/// <summary>What one step held and how long each of its parts took, in ticks of <see cref="Stopwatch"/>.</summary>
internal sealed record StepRecord(int Rows, int Sequences, int Outputs, long AttendedTokens, long ContextTokens, long[] Ticks)
{
    public double Milliseconds(Part part) => Ticks[(int)part] * 1000.0 / Stopwatch.Frequency;
}

/// <summary>
/// Passes every call on and notes, of each, which part of the step it is and how long it took. The two clock reads a call cost are some
/// 10 us a step of 24 layers, most of them counted as the host's.
/// </summary>
internal sealed class RecordingBackend(IBackend inner) : IBackend
{
    private readonly List<StepRecord> _records = new(4096);
    private long[] _ticks = [];
    private long _last;

    /// <summary>Called on the loop's thread when a step begins, before anything is timed.</summary>
    public Action? StepBegins { get; set; }

    /// <summary>Whether steps are noted.</summary>
    public bool Recording { get; set; }

    /// <summary>Steps noted so far. To be read while no step runs.</summary>
    public IReadOnlyList<StepRecord> Records => _records;

    public string Name => inner.Name;

    public long AvailableBytes => inner.AvailableBytes;

    public WeightFormat WeightFormat => inner.WeightFormat;

    public long HeldBytes => inner.HeldBytes;

    public int KvElementBytes => inner.KvElementBytes;

    public long KvCacheBudget => inner.KvCacheBudget;

    public int LogitRows => inner.LogitRows;

    public int WriteRows => inner.WriteRows;

    public void Clear() => _records.Clear();

    public Tensor AllocateTensor(int rows, int columns, bool rounded = false) => inner.AllocateTensor(rows, columns, rounded);

    public Weight AllocateWeight(int outputs, int inputs) => inner.AllocateWeight(outputs, inputs);

    public WeightArena AllocateWeights(IReadOnlyList<(int Outputs, int Inputs)> shapes) => inner.AllocateWeights(shapes);

    public KvCache AllocateKvCache(int layers, int blocks, int kvHeads, int headDim)
        => inner.AllocateKvCache(layers, blocks, kvHeads, headDim);

    public RopeTable AllocateRopeTable(ReadOnlySpan<float> inverseFrequencies, int positions, float scale)
        => inner.AllocateRopeTable(inverseFrequencies, positions, scale);

    public void WriteWeight(Weight destination, long element, ReadOnlySpan<byte> source, DType type)
        => inner.WriteWeight(destination, element, source, type);

    public void WriteWeightElements(Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type)
        => inner.WriteWeightElements(destination, element, indices, values, type);

    public void CopyWeight(Weight source, Weight destination) => inner.CopyWeight(source, destination);

    public void ReadWeight(Weight source, long element, Span<float> destination) => inner.ReadWeight(source, element, destination);

    public int StepsUnderWay => inner.StepsUnderWay;

    public int StepTokens => inner.StepTokens;

    public IEnumerable<StepLayout> Rehearsals(StepLayout room) => inner.Rehearsals(room);

    public void BeginStep(StepLayout step)
    {
        // The host's part of a step ends here: what it did since the last call belongs to the step that begins.
        long host = _last == 0 ? 0 : Stopwatch.GetTimestamp() - _last;
        StepBegins?.Invoke();
        if (Recording) Note(step, host);
        _last = Stopwatch.GetTimestamp();
        inner.BeginStep(step);
        Took(Part.Host);
    }

    public void Embed(Weight table, Tensor output)
    {
        Starts();
        inner.Embed(table, output);
        Took(Part.Embed);
    }

    public void RmsNorm(Tensor input, Weight scale, float epsilon, Tensor output, int rows)
    {
        Starts();
        inner.RmsNorm(input, scale, epsilon, output, rows);
        Took(Part.Norms);
    }

    public void MatMul(Tensor input, Weight weight, Weight? bias, Tensor output, int rows)
    {
        Starts();
        inner.MatMul(input, weight, bias, output, rows);
        Took(PartOf(weight));
    }

    public void MatMulAdd(Tensor input, Weight weight, Weight? bias, Tensor residual, int rows)
    {
        Starts();
        inner.MatMulAdd(input, weight, bias, residual, rows);
        Took(PartOf(weight));
    }

    public void RopeStoreKv(Tensor qkv, int heads, Weight? queryNorm, Weight? keyNorm, float epsilon, RopeTable rope, KvCache cache,
        int layer)
    {
        Starts();
        inner.RopeStoreKv(qkv, heads, queryNorm, keyNorm, epsilon, rope, cache, layer);
        Took(Part.RopeStore);
    }

    public void Attend(Tensor qkv, int heads, float scale, KvCache cache, int layer, Tensor output)
    {
        Starts();
        inner.Attend(qkv, heads, scale, cache, layer, output);
        Took(Part.Attention);
    }

    public void GatedSilu(Tensor gateUp, Tensor output, int rows)
    {
        Starts();
        inner.GatedSilu(gateUp, output, rows);
        Took(Part.Silu);
    }

    public void GatherRows(Tensor input, int first, int count, Tensor output)
    {
        Starts();
        inner.GatherRows(input, first, count, output);
        Took(Part.Gather);
    }

    public void Sample(Tensor logits, int first, int count)
    {
        Starts();
        inner.Sample(logits, first, count);
        Took(Part.Sampling);
    }

    public void FinishStep(StepLayout step) => inner.FinishStep(step);

    public void CopyBlock(KvCache cache, int from, int to) => inner.CopyBlock(cache, from, to);

    public void Dispose() => inner.Dispose();

    private static Part PartOf(Weight weight) => (weight.Outputs, weight.Inputs) switch
    {
        (Workload.QkvOutputs, _) => Part.Qkv,
        (2 * Workload.Intermediate, _) => Part.GateUp,
        (_, Workload.Intermediate) => Part.Down,
        (Workload.Hidden, _) => Part.Output,
        _ => Part.Head,
    };

    private void Starts()
    {
        long now = Stopwatch.GetTimestamp();
        Add(Part.Host, now - _last);
        _last = now;
    }

    private void Took(Part part)
    {
        long now = Stopwatch.GetTimestamp();
        Add(part, now - _last);
        _last = now;
    }

    private void Add(Part part, long ticks)
    {
        if (_ticks.Length > 0) _ticks[(int)part] += ticks;
    }

    private void Note(StepLayout step, long host)
    {
        long attended = 0;
        for (int row = 0; row < step.RowCount; row++) attended += step.Positions[row] + 1;
        long context = 0;
        for (int s = 0; s < step.SequenceCount; s++) context += step.Positions[step.RowStart[s + 1] - 1] + 1;
        _ticks = new long[Enum.GetValues<Part>().Length];
        _ticks[(int)Part.Host] = host;
        _records.Add(new StepRecord(step.RowCount, step.SequenceCount, step.OutputCount, attended, context, _ticks));
    }
}
