using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>A step from its planning to its end: what the backend computes, and for whom. Taken once and filled again and again.</summary>
internal sealed class ScheduledStep(StepLayout layout)
{
    public StepLayout Layout { get; } = layout;

    /// <summary>Of sequence s of the layout.</summary>
    public Sequence[] Sequences { get; } = new Sequence[layout.RowStart.Length - 1];

    /// <summary>What query q of the layout is for.</summary>
    public Question[] Questions { get; } = new Question[layout.Queries.Length];

    /// <summary>To be done between the step's forward pass and its end: samples that part from their leader take its last, partial block.</summary>
    public List<BlockCopy> Copies { get; } = new(layout.RowStart.Length - 1);

    public void Clear()
    {
        Layout.Clear();
        Copies.Clear();
    }
}

/// <summary>The log-probability at a prompt position, or (-1) the sequence's next token.</summary>
internal readonly record struct Question(Sequence Sequence, int PromptPosition);

/// <summary>Copy KV block From to block To; From is -1 where nothing is to be copied.</summary>
internal readonly record struct BlockCopy(int From, int To);
