namespace Rollout.Client;

/// <summary>The newest lines of a program's output. Safe from any thread.</summary>
internal sealed class LastLines(int keep)
{
    private readonly Queue<string> _lines = new(keep);

    public void Add(string line)
    {
        lock (_lines)
        {
            if (_lines.Count == keep)
                _lines.Dequeue();
            _lines.Enqueue(line);
        }
    }

    public IReadOnlyList<string> Snapshot()
    {
        lock (_lines)
            return [.. _lines];
    }
}
