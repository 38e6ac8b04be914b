namespace Rollout.Engine;

/// <summary>
/// A model on disk that cannot be used: a file that does not parse, a checkpoint that does not fit its config, a feature that is not
/// supported. Carries every problem found, so that a user can fix all of them at once.
/// </summary>
public sealed class InvalidModelException : Exception
{
    public InvalidModelException(string path, IReadOnlyList<string> problems, Exception? inner = null)
        : base(Describe(path, problems), inner)
    {
        Path = path;
        Problems = problems;
    }

    public InvalidModelException(string path, string problem, Exception? inner = null)
        : this(path, [problem], inner)
    {
    }

    /// <summary>The invalid file or folder.</summary>
    public string Path { get; }

    /// <summary>Every problem found, each a sentence that names the field or tensor.</summary>
    public IReadOnlyList<string> Problems { get; }

    internal static void ThrowIfAny(string path, List<string> problems)
    {
        if (problems.Count > 0)
            throw new InvalidModelException(path, problems);
    }

    /// <summary>A name from a file, made safe for a message: quoted, without control characters, truncated.</summary>
    internal static string Quote(string name)
    {
        const int Most = 200;
        string text = string.Concat(name.Take(Most).Select(c => char.IsControl(c) ? '\uFFFD' : c));
        return name.Length > Most ? $"'{text}...'" : $"'{text}'";
    }

    private static string Describe(string path, IReadOnlyList<string> problems)
    {
        if (problems.Count == 1)
            return $"{path}: {problems[0]}";
        // A hostile header can hold millions of problems; a message must stay readable in a log.
        IEnumerable<string> lines = problems.Take(ProblemList.Most).Select(problem => "\n  " + problem);
        string rest = problems.Count > ProblemList.Most ? $"\n  and {problems.Count - ProblemList.Most} more" : "";
        return $"{path}: {problems.Count} problems{string.Concat(lines)}{rest}";
    }
}
