using System.Diagnostics;
using Rollout.Kernels;

namespace Rollout.Micro;

/// <summary>The parts of a step, as the transformer calls them; "host" is everything between two calls of the backend.</summary>
internal enum Part
{
    Embed, Norms, Qkv, Attention, Output, GateUp, Silu, Down, Gather, Head, Sampling, Host,
}

/// <summary>The contents of one step and the time of each of its parts, in ticks of <see cref="Stopwatch"/>.</summary>
internal sealed record StepRecord(int Rows, int Sequences, int Outputs, long AttendedTokens, long ContextTokens, long[] Ticks)
{
    public double Milliseconds(Part part) => Ticks[(int)part] * 1000.0 / Stopwatch.Frequency;
}

/// <summary>
/// Passes every call on and records which part of the step it is and how long it took. The two clock reads a call cost some 10 us a step of
/// 24 layers, most of it counted as host.
/// </summary>
internal sealed class RecordingBackend(Backend inner) : DelegatingBackend(inner)
{
    private readonly List<StepRecord> _records = new(4096);
    private long[] _ticks = [];
    private long _last;

    /// <summary>Called on the loop's thread when a step begins, before anything is timed.</summary>
    public Action? StepBegins { get; set; }

    /// <summary>Whether steps are recorded.</summary>
    public bool Recording { get; set; }

    /// <summary>Steps recorded so far. To be read while no step runs.</summary>
    public IReadOnlyList<StepRecord> Records => _records;

    public void Clear() => _records.Clear();

    protected override void BeginStepCore(StepLayout step)
    {
        // The host's part of a step ends here: what it did since the last call belongs to the new step.
        long host = _last == 0 ? 0 : Stopwatch.GetTimestamp() - _last;
        StepBegins?.Invoke();
        if (Recording) Note(step, host);
        _last = Stopwatch.GetTimestamp();
        base.BeginStepCore(step);
        Took(Part.Host);
    }

    protected override void EmbedCore(Weight table, Tensor output)
    {
        Starts();
        base.EmbedCore(table, output);
        Took(Part.Embed);
    }

    protected override void RmsNormCore(Tensor input, Weight scale, float epsilon, Tensor output, int rows)
    {
        Starts();
        base.RmsNormCore(input, scale, epsilon, output, rows);
        Took(Part.Norms);
    }

    protected override void RmsNormAddCore(Tensor input, Weight scale, float epsilon, Tensor residual, int rows)
    {
        Starts();
        base.RmsNormAddCore(input, scale, epsilon, residual, rows);
        Took(Part.Norms);
    }

    protected override void MatMulCore(Tensor input, Weight weight, Weight? bias, Tensor output, int rows, bool add)
    {
        Starts();
        base.MatMulCore(input, weight, bias, output, rows, add);
        Took(PartOf(weight));
    }

    protected override void AttentionCore(in AttentionCall call)
    {
        Starts();
        base.AttentionCore(call);
        Took(Part.Attention);
    }

    protected override void GatedSiluCore(Tensor gateUp, Tensor output, int rows)
    {
        Starts();
        base.GatedSiluCore(gateUp, output, rows);
        Took(Part.Silu);
    }

    protected override void GatherRowsCore(Tensor input, int first, int count, Tensor output)
    {
        Starts();
        base.GatherRowsCore(input, first, count, output);
        Took(Part.Gather);
    }

    protected override void SampleCore(Tensor logits, int first, int count, int begin, int end)
    {
        Starts();
        base.SampleCore(logits, first, count, begin, end);
        Took(Part.Sampling);
    }

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
